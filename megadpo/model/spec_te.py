"""The layer spec of Transformer Engine's modules: norm and linear in one kernel, fused weight gradients, float8.

The embedding, the head and attention stay as in the local spec: the head takes its weight and no logits are made, and
attention is PackedAttention over the run's kernel.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megadpo.model.attention import PackedAttention


class TeModules(NamedTuple):
    """Transformer Engine's modules as megatron-core wraps them."""

    norm_column: Any
    """RMSNorm and a column-parallel linear layer in one: `layer_norm_weight` and `weight`."""
    column: Any
    row: Any
    norm: Any
    grouped_column: Any
    """All experts of a rank: `weight0`, `weight1`, ..."""
    grouped_row: Any


def te_modules() -> TeModules:
    """Raises ImportError without Transformer Engine."""
    from megatron.core.extensions import transformer_engine as te

    return TeModules(
        norm_column=te.TELayerNormColumnParallelLinear,
        column=te.TEColumnParallelLinear,
        row=te.TERowParallelLinear,
        norm=te.TENorm,
        grouped_column=te.TEColumnParallelGroupedLinear,
        grouped_row=te.TERowParallelGroupedLinear,
    )


def te_layer_spec(
    config: TransformerConfig, *, fuse_weight_gradient: bool, experts: MoESubmodules | None, layer: type, moe: type
) -> ModuleSpec:
    """A pre-norm layer of Transformer Engine's modules.

    experts: the router and the experts one by one, of a layer of experts (`layer` and `moe`: its classes); None for a
    dense one. Parameters have the names that checkpoints carry.
    """
    te = te_modules()
    if fuse_weight_gradient:
        te = TeModules(*(part if part is te.norm else with_fused_weight_gradient(part) for part in te))
    qk_norm = te.norm if config.qk_layernorm else IdentityOp
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=te.norm_column, linear_fc2=te.row))
    if experts is not None:
        mlp = ModuleSpec(module=moe, submodules=_experts(te, config, experts))
    return ModuleSpec(
        module=TransformerLayer if experts is None else layer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=te.norm_column,
                    core_attention=PackedAttention,
                    linear_proj=te.row,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # Experts see the normed tokens through the router too, so their norm stays a module of its own.
            pre_mlp_layernorm=IdentityOp if experts is None else te.norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _experts(te: TeModules, config: TransformerConfig, local: MoESubmodules) -> MoESubmodules:
    """Experts in one grouped kernel; one by one (`moe_grouped_gemm: false`) they are megatron-core's own."""
    routed = local.experts
    if config.moe_grouped_gemm:
        linears = MLPSubmodules(linear_fc1=te.grouped_column, linear_fc2=te.grouped_row)
        routed = ModuleSpec(module=TEGroupedMLP, submodules=linears)
    assert routed.module in (TEGroupedMLP, SequentialMLP)
    shared = MLPSubmodules(linear_fc1=te.column, linear_fc2=te.row)
    return MoESubmodules(
        router=local.router,
        experts=routed,
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=shared),
    )


def with_fused_weight_gradient(module: type) -> type:
    """`module`, adding weight gradients to the gradient buffer in the kernel that computes them.

    A switch of the module's own config: megatron-core's output layer, which shares the run's, would refuse it without
    apex, although our head never calls that layer.
    """

    class Fused(module):
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            config = copy.copy(config)
            config.gradient_accumulation_fusion = True
            super().__init__(*args, config=config, **kwargs)

    Fused.__name__ = Fused.__qualname__ = module.__name__
    return Fused
