"""Implementations of decoder layers: megatron-core's own modules, or Transformer Engine's fused ones.

An implementation is one file here, or a file that the config names in `plugins`: `@LAYER_IMPLEMENTATIONS.add(name)` on a
LayerImplementation. Every config check imports it, so it must import its modules only when a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.config.variants import LAYER_IMPLEMENTATIONS

if TYPE_CHECKING:
    from megadpo.model.decoder import LayerModules

MEGATRON = "policy.megatron_cfg"


class LayerImplementation:
    """Base of the implementations."""

    name: str
    priority: ClassVar[int | None] = None
    """transformer_impl auto takes the implementation with the highest priority that can run here. None: it must be named."""
    fuses_rope: ClassVar[bool] = False
    """Whether it has a kernel for `apply_rope_fusion`."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Reasons why it can't run, and settings of the config that it can't do."""
        raise NotImplementedError

    def reason(self, known: Known) -> str:
        """Why it was chosen, for the banner."""
        if known.cfg.policy.megatron_cfg.transformer_impl != "auto":
            return f"asked for by {LAYER_IMPLEMENTATIONS.field}"
        return self.reason_of_auto(known)

    def reason_of_auto(self, known: Known) -> str:
        raise NotImplementedError

    def modules(self, *, fuse_weight_gradient: bool) -> LayerModules:
        """The modules of a layer. fuse_weight_gradient: the kernel that computes a weight's gradient adds it to the gradient
        buffer."""
        raise NotImplementedError

    def fuses_weight_gradient(self, megatron: MegatronConfig) -> bool:
        """The value of `gradient_accumulation_fusion`; for null, whether these modules have a kernel for it."""
        return False

    def groups_experts(self, megatron: MegatronConfig) -> bool:
        """The value of `moe_grouped_gemm`; for null, whether these modules have one kernel for a rank's experts."""
        return False


def has_apex_kernel(known: Known) -> bool:
    """Whether apex's kernel is installed, which megatron-core's own linear layers need to fuse weight gradients."""
    machine = known.machine
    if machine is None or machine.device != "cuda":
        return False
    return machine.why_missing("fused_weight_gradient_mlp_cuda") is None
