"""The decoder's layers: the module at each place of megatron-core's transformer layer.

Every choice is explicit. megatron-core's own helpers choose by what is installed (for example apex's FusedLayerNorm, which
refuses RMSNorm), and behaviour must not depend on that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from megadpo.config.architecture import Architecture, Attention, DeltaNet, Experts, Layer, Mlp
from megadpo.model.activation import gated
from megadpo.model.attention import GatedSelfAttention, JoinedSelfAttention, PackedAttention, PackTransformerLayer
from megadpo.model.delta_net import GatedDeltaNet
from megadpo.model.latent_attention import LatentAttention
from megadpo.model.moe import ExpertRow, PackMoELayer, PackRouter
from megadpo.model.moe_balance import LoadBalance
from megadpo.model.norm import ResidualAdd


@dataclass(frozen=True)
class LayerModules:
    """The classes of a layer implementation (model/layers/)."""

    norm: Any
    """RMSNorm."""
    column: Any
    """The column-parallel linear layer."""
    row: Any
    norm_column: Any = None
    """Norm and column-parallel linear layer in one, with `layer_norm_weight` and `weight`; None: they are two modules."""
    grouped_column: Any = None
    """One layer for all experts of a rank, with `weight0`, `weight1`, ...; None: there is none."""
    grouped_row: Any = None


def block_spec(
    arch: Architecture,
    config: TransformerConfig,
    modules: LayerModules,
    balance: LoadBalance | None,
    *,
    joined_qkv: bool,
    pp_rank: int,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its model chunk `vp_stage` if it has several, and the final norm (which only
    the model's last chunk builds). balance: for layers with experts; None for a dense model.
    joined_qkv: attention gets the whole projection, if it can use it (`fused_single_qkv_rope`)."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    specs = {layer: _layer_spec(arch, layer, config, modules, balance, joined_qkv) for layer in set(arch.layers)}
    layers = [specs[layer] for layer in arch.layers[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=modules.norm)


def _layer_spec(
    arch: Architecture,
    layer: Layer,
    config: TransformerConfig,
    modules: LayerModules,
    balance: LoadBalance | None,
    joined_qkv: bool,
) -> ModuleSpec:
    """In checkpoints parameters have the names of Transformer Engine's fused modules, so both implementations can read
    them."""
    mlp, before = layer.feed_forward, arch.norms.placement != "post"
    dense = isinstance(mlp, Mlp)
    joined = before and modules.norm_column is not None
    joined_qkv = joined_qkv and isinstance(layer.attention, Attention) and layer.attention.turns_projection
    latent = isinstance(layer.attention, Attention) and layer.attention.latent is not None
    first = modules.norm_column if joined else modules.column
    names = {}
    if before and not joined and not latent:
        projection = "linear_in_proj" if isinstance(layer.attention, DeltaNet) else "linear_qkv"
        names["input_layernorm."] = f"self_attention.{projection}.layer_norm_"
    if before and not joined and dense:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    add = _residual_add(arch, config, modules)
    return ModuleSpec(
        module=PackTransformerLayer,
        submodules=TransformerLayerSubmodules(
            # In latent attention two projections read the norm's output, so the norm is a module of its own.
            input_layernorm=modules.norm if before and (latent or not joined) else IdentityOp,
            self_attention=_attention(layer.attention, modules, first, joined=joined_qkv),
            self_attn_bda=add,
            # The router reads the norm's output too, so before experts the norm is always a module of its own.
            pre_mlp_layernorm=modules.norm if before and not (joined and dense) else IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=_mlp(mlp, first, modules.row))
            if isinstance(mlp, Mlp)
            else ModuleSpec(module=PackMoELayer, submodules=_experts(mlp, config, modules, balance)),
            mlp_bda=add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _attention(kind: Attention | DeltaNet, modules: LayerModules, first: Any, *, joined: bool) -> Any:
    if isinstance(kind, DeltaNet):
        return ModuleSpec(module=GatedDeltaNet, params={"kind": kind, "column": first, "row": modules.row})
    if kind.latent is not None:
        classes = {"norm": modules.norm, "column": modules.column, "row": modules.row}
        return ModuleSpec(module=LatentAttention, params={"kind": kind, **classes})
    qk_norm = modules.norm if kind.qk_norm == "head" else IdentityOp
    return ModuleSpec(
        module=JoinedSelfAttention if joined else GatedSelfAttention if kind.output_gate else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=first,
            core_attention=functools.partial(PackedAttention, kind=kind, joined=joined),
            linear_proj=modules.row,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _residual_add(arch: Architecture, config: TransformerConfig, modules: LayerModules) -> Any:
    if arch.norms.placement == "pre" and arch.residual_multiplier == 1.0:
        return get_bias_dropout_add
    norm = None if arch.norms.placement == "pre" else modules.norm
    return ModuleSpec(
        module=ResidualAdd, params={"config": config, "norm": norm, "multiplier": arch.residual_multiplier}
    )


def _mlp(mlp: Mlp, first: Any, second: Any) -> MLPSubmodules:
    # the activation is built if `use_te_activation_func` is set (transformer_config.py)
    return MLPSubmodules(linear_fc1=first, linear_fc2=second, activation_func=gated(mlp))


def _experts(
    of: Experts, config: TransformerConfig, modules: LayerModules, balance: LoadBalance | None
) -> MoESubmodules:
    """The router and the experts: in one grouped kernel, or one by one (then always megatron-core's own layers)."""
    assert balance is not None
    experts = ModuleSpec(module=SequentialMLP, submodules=_mlp(of.mlp, ColumnParallelLinear, ExpertRow))
    if config.moe_grouped_gemm:
        linears = _mlp(of.mlp, modules.grouped_column, modules.grouped_row)
        experts = ModuleSpec(module=TEGroupedMLP, submodules=linears)
    return MoESubmodules(
        router=functools.partial(PackRouter, router=of.router, balance=balance),
        experts=experts,
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_mlp(of.mlp, modules.column, modules.row)),
    )
