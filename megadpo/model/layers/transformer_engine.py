"""Transformer Engine's modules: norm and linear layer in one kernel, fused weight gradients, float8.

Embedding, head and attention are those of the local layers: the head reads its weight and makes no logits tensor, and
attention is PackedAttention with the run's kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megadpo.config.architecture import Architecture
from megadpo.config.known import INSTALL, Known, Machine
from megadpo.config.problems import Problem
from megadpo.config.schema_megatron import FP8_TOKENS, Fp8Config, MegatronConfig
from megadpo.config.variants import LAYER_IMPLEMENTATIONS
from megadpo.model.layers import MEGATRON, LayerImplementation

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megadpo.model.decoder import LayerModules

_FP8 = f"{MEGATRON}.fp8_cfg.enabled"


@LAYER_IMPLEMENTATIONS.add("transformer_engine")
class TransformerEngineLayers(LayerImplementation):
    """Its modules as megatron-core wraps them."""

    name, priority, fuses_rope = "transformer_engine", 1, True

    def problems(self, known: Known) -> Iterator[Problem]:
        reason = why_not_transformer_engine(known)
        if reason is not None:
            fix = f"set it to auto or local, or change the other; on a machine with CUDA, {INSTALL}"
            expected = f"local or auto: Transformer Engine can't be used here: {reason}"
            yield Problem(LAYER_IMPLEMENTATIONS.field, self.name, expected, fix)
        if known.cfg.policy.megatron_cfg.fp8_cfg.enabled:
            yield from [without_float8(reason)] if reason is not None else _float8_problems(known)

    def reason_of_auto(self, known: Known) -> str:
        return "CUDA, bfloat16, Transformer Engine installed"

    def modules(self, *, fuse_weight_gradient: bool) -> LayerModules:
        modules = te_modules()
        if not fuse_weight_gradient:
            return modules
        fused = {name: with_fused_weight_gradient(part) for name, part in vars(modules).items() if name != "norm"}
        return type(modules)(norm=modules.norm, **fused)

    def fuses_weight_gradient(self, megatron: MegatronConfig) -> bool:
        return megatron.gradient_accumulation_fusion is not False

    def groups_experts(self, megatron: MegatronConfig) -> bool:
        return megatron.moe_grouped_gemm is not False


def why_not_transformer_engine(known: Known) -> str | None:
    """Why its layers can't be used; None if no reason is known."""
    policy, megatron = known.cfg.policy, known.cfg.policy.megatron_cfg
    if known.device == "cpu":
        return "no CUDA device" if known.machine is not None else "policy.device cpu"
    if policy.precision != "bfloat16":
        return f"policy.precision {policy.precision}: its matrix products of float32 run in TF32"
    selective = megatron.activation_checkpointing and megatron.recompute_granularity == "selective"
    if selective and "layernorm" in megatron.recompute_modules:
        return f"{MEGATRON}.recompute_modules with layernorm: its norms are part of the linear layers that follow"
    return None if known.machine is None else known.machine.why_missing("transformer_engine")


def without_float8(reason: str) -> Problem:
    """The problem of float8 with other layers, which are used for `reason`."""
    expected = f"false: float8 needs Transformer Engine's layers, which don't run here: {reason}"
    return Problem(_FP8, True, expected, f"set it to false, or change the other; on a machine with CUDA, {INSTALL}")


def _float8_problems(known: Known) -> Iterator[Problem]:
    """With these layers: why this config, this model or this GPU don't allow float8."""
    policy, megatron = known.cfg.policy, known.cfg.policy.megatron_cfg
    recipe, multiple = megatron.fp8_cfg.fp8_recipe, policy.make_sequence_length_divisible_by
    shards = megatron.context_parallel_size * (megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1)
    needed = shards * FP8_TOKENS[recipe]
    if multiple % needed:
        where = "policy.make_sequence_length_divisible_by"
        each = f"{FP8_TOKENS[recipe]} tokens on each of {shards} ranks"
        expected = f"a multiple of {needed}: {recipe} float8 wants multiples of {each}"
        yield Problem(where, multiple, expected, f"remove it, or set it to {needed}")
    if known.machine is not None and (reason := _no_float8(megatron.fp8_cfg, known.machine)) is not None:
        yield Problem(_FP8, True, f"false on this GPU: {reason}", "set it to false")
    if known.arch is not None:
        yield from _float8_shape(megatron, known.arch)


def _no_float8(fp8: Fp8Config, machine: Machine) -> str | None:
    """Why this GPU can't do float8 with this recipe; None if it can, or if the GPU isn't known."""
    if machine.compute_capability is not None and machine.compute_capability < (9, 0):
        return f"its compute capability {'.'.join(map(str, machine.compute_capability))} is older than Hopper's 9.0"
    if fp8.fp8_recipe == "blockwise" and machine.cuda_version is not None and machine.cuda_version < (12, 9):
        return f"blockwise scaling needs CUDA 12.9, and torch was built for {'.'.join(map(str, machine.cuda_version))}"
    return None


def _float8_shape(megatron: MegatronConfig, arch: Architecture) -> Iterator[Problem]:
    """A problem if float8 can't be used for a matrix: on each tensor-parallel rank its sides must be multiples of 16, or of
    128 for blockwise scales."""
    if arch.experts is not None or arch.mlp is None:
        expected = f"false for {arch.hf_class}: layers of experts have not been run in float8"
        yield Problem(_FP8, True, expected, "set it to false")
        return
    recipe, tp, attention = megatron.fp8_cfg.fp8_recipe, megatron.tensor_model_parallel_size, arch.attention
    heads, groups, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    multiple = FP8_TOKENS[recipe]
    sides = {
        "hidden channels": arch.hidden_size,
        "MLP channels": arch.mlp.ffn_size // tp,
        "query channels": heads * width // tp,
        "query, key and value channels": (attention.query_heads + 2 * groups) * width // tp,
    }
    if (delta_net := arch.delta_net) is not None:
        sides |= {
            "channels of linear attention's first projection": delta_net.in_channels // tp,
            "value channels of linear attention": delta_net.value_heads * delta_net.value_dim // tp,
        }
    odd = [f"{count} {what}" for what, count in sides.items() if count % multiple]
    if odd:
        other = ", or fp8_recipe: tensorwise" if recipe == "blockwise" else ""
        expected = f"layers whose sides are multiples of {multiple} for {recipe} float8; a rank's have {', '.join(odd)}"
        yield Problem(_FP8, True, expected, f"set it to false, lower tensor_model_parallel_size{other}")


def te_modules() -> LayerModules:
    from megatron.core.extensions import transformer_engine as te

    from megadpo.model.decoder import LayerModules

    return LayerModules(
        norm=te.TENorm,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        norm_column=te.TELayerNormColumnParallelLinear,
        grouped_column=te.TEColumnParallelGroupedLinear,
        grouped_row=te.TERowParallelGroupedLinear,
    )


def with_fused_weight_gradient(module: type) -> type:
    """`module` with a kernel that adds weight gradients to the gradient buffer.

    The option is set in the module's own copy of the config: megatron-core's output layer, which has the run's config,
    would refuse it without apex, although our head never calls that layer.
    """

    class Fused(module):
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    Fused.__name__ = Fused.__qualname__ = module.__name__
    return Fused
