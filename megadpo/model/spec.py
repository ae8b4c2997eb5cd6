"""The layer spec: which module stands at which place of megatron-core's transformer layer.

Every choice is explicit. megatron-core's own spec helpers pick by what is installed (apex's FusedLayerNorm, for one,
which refuses RMSNorm), and behaviour must not depend on that.
"""

from __future__ import annotations

import functools

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megadpo.model.activation import swiglu
from megadpo.model.attention import PackedAttention
from megadpo.model.moe import PackMoELayer, PackRouter, PackTransformerLayer
from megadpo.model.moe_balance import LoadBalance
from megadpo.model.norm import RMSNorm
from megadpo.model.spec_te import te_layer_spec, te_modules


def local_layer_spec(config: TransformerConfig, balance: LoadBalance | None = None) -> ModuleSpec:
    """A pre-norm layer of megatron-core's own tensor-parallel modules: runs on CPUs and GPUs alike.

    balance: of the model's layers of experts; None for a dense model.
    """
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    # Checkpoints carry the names of Transformer Engine's fused modules, so that either spec reads them.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if balance is None:  # before experts the norm stays a module of its own in Transformer Engine's spec too
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer if balance is None else PackTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=_mlp())
            if balance is None
            else ModuleSpec(module=PackMoELayer, submodules=_experts(balance)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _mlp() -> MLPSubmodules:
    return MLPSubmodules(
        linear_fc1=ColumnParallelLinear,
        linear_fc2=RowParallelLinear,
        activation_func=swiglu,  # built where `use_te_activation_func` says so, see transformer_config.py
    )


def _experts(balance: LoadBalance) -> MoESubmodules:
    """The router, and experts one by one."""
    return MoESubmodules(
        router=functools.partial(PackRouter, balance=balance),
        experts=ModuleSpec(module=SequentialMLP, submodules=_mlp()),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_mlp()),
    )


def block_spec(
    config: TransformerConfig,
    pp_rank: int,
    chunk: int | None,
    balance: LoadBalance | None,
    *,
    fuse_weight_gradient: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its model chunk number `chunk` where it has several, and the final norm
    (built where the model ends): whose they are is `config.transformer_impl`.

    fuse_weight_gradient: of Transformer Engine's layers; the local ones go by config.gradient_accumulation_fusion.
    """
    count = get_num_layers_to_build(config, vp_stage=chunk, pp_rank=pp_rank)
    if config.transformer_impl == "local":
        return TransformerBlockSubmodules(layer_specs=[local_layer_spec(config, balance)] * count, layer_norm=RMSNorm)
    spec = te_layer_spec(
        config,
        fuse_weight_gradient=fuse_weight_gradient,
        experts=None if balance is None else _experts(balance),
        layer=PackTransformerLayer,
        moe=PackMoELayer,
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=te_modules().norm)
