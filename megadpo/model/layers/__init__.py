"""Whose modules a decoder layer is made of: megatron-core's own, or Transformer Engine's fused ones.

An implementation is one file here, or in a file that the config names in `plugins`: `@LAYER_IMPLEMENTATIONS.add(name)` on
a LayerImplementation. It is read whenever a config is checked, so it imports its modules when a model is built.
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
    """With transformer_impl auto the implementation with the highest that can run here does. None: by its name only."""
    fuses_rope: ClassVar[bool] = False
    """Whether `apply_rope_fusion` has a kernel."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Why it can't run, and what it can't do of what the config asks."""
        raise NotImplementedError

    def reason(self, known: Known) -> str:
        """Why it was chosen, in words for the banner."""
        if known.cfg.policy.megatron_cfg.transformer_impl != "auto":
            return f"asked for by {LAYER_IMPLEMENTATIONS.field}"
        return self.reason_of_auto(known)

    def reason_of_auto(self, known: Known) -> str:
        raise NotImplementedError

    def modules(self, *, fuse_weight_gradient: bool) -> LayerModules:
        """What a layer is made of. fuse_weight_gradient: add weight gradients to the gradient buffer in the kernel that
        computes them."""
        raise NotImplementedError

    def fuses_weight_gradient(self, megatron: MegatronConfig) -> bool:
        """`gradient_accumulation_fusion`: as asked, or wherever these modules have a kernel for it."""
        return False

    def groups_experts(self, megatron: MegatronConfig) -> bool:
        """`moe_grouped_gemm`: as asked, or wherever these modules run a rank's experts in one kernel."""
        return False


def has_apex_kernel(known: Known) -> bool:
    """Whether apex's kernel is there, without which megatron-core's own linear layers refuse to fuse weight gradients."""
    machine = known.machine
    if machine is None or machine.device != "cuda":
        return False
    return machine.why_missing("fused_weight_gradient_mlp_cuda") is None
