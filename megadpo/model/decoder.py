"""The decoder's layers: which module stands at which place of megatron-core's transformer layer, and those that are ours.

Every choice is explicit. megatron-core's own spec helpers pick by what is installed (apex's FusedLayerNorm, for one,
which refuses RMSNorm), and behaviour must not depend on that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
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
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional as F

from megadpo.model.attention import PackedAttention
from megadpo.model.moe import PackMoELayer, PackRouter, PackTransformerLayer
from megadpo.model.moe_balance import LoadBalance


@dataclass(frozen=True)
class LayerModules:
    """The classes that an implementation (model/layers/) makes a layer of."""

    norm: Any
    """RMSNorm."""
    column: Any
    """The column-parallel linear layer."""
    row: Any
    norm_column: Any = None
    """Norm and column-parallel linear layer in one, `layer_norm_weight` and `weight`; None: they are two modules."""
    grouped_column: Any = None
    """All experts of a rank in one: `weight0`, `weight1`, ...; None where there is none."""
    grouped_row: Any = None


def block_spec(
    config: TransformerConfig, modules: LayerModules, balance: LoadBalance | None, *, pp_rank: int, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, or of its model chunk `vp_stage` where it has several, and the final norm (built
    where the model ends). balance: of the model's layers of experts; None for a dense model."""
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    spec = _layer_spec(config, modules, balance)
    return TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=modules.norm)


def _layer_spec(config: TransformerConfig, modules: LayerModules, balance: LoadBalance | None) -> ModuleSpec:
    """A pre-norm layer. Parameters have the names of Transformer Engine's fused modules in checkpoints, so that layers of
    either implementation read them."""
    joined, dense = modules.norm_column is not None, balance is None
    first = modules.norm_column if joined else modules.column
    qk_norm = modules.norm if config.qk_layernorm else IdentityOp
    names = {} if joined else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not joined and dense:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer if dense else PackTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if joined else modules.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=first,
                    core_attention=PackedAttention,
                    linear_proj=modules.row,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # Experts see the normed tokens through the router too, so their norm is always a module of its own.
            pre_mlp_layernorm=IdentityOp if joined and dense else modules.norm,
            mlp=ModuleSpec(module=MLP, submodules=_mlp(first, modules.row))
            if balance is None
            else ModuleSpec(module=PackMoELayer, submodules=_experts(config, modules, balance)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _mlp(first: Any, second: Any) -> MLPSubmodules:
    # the activation is built where `use_te_activation_func` says so, see transformer_config.py
    return MLPSubmodules(linear_fc1=first, linear_fc2=second, activation_func=swiglu)


def _experts(config: TransformerConfig, modules: LayerModules, balance: LoadBalance) -> MoESubmodules:
    """The router and the experts: in one grouped kernel, or one by one, which are always megatron-core's own."""
    experts = ModuleSpec(module=SequentialMLP, submodules=_mlp(ColumnParallelLinear, RowParallelLinear))
    if config.moe_grouped_gemm:
        linears = MLPSubmodules(linear_fc1=modules.grouped_column, linear_fc2=modules.grouped_row)
        experts = ModuleSpec(module=TEGroupedMLP, submodules=linears)
    return MoESubmodules(
        router=functools.partial(PackRouter, balance=balance),
        experts=experts,
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=_mlp(modules.column, modules.row)),
    )


class _RmsNorm(torch.autograd.Function):
    """One number a row is kept besides the input; torch's own, on CPUs, keeps three tensors of the input's size."""

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        d_weight = (grad * normed).flatten(0, -2).sum(dim=0)
        d_normed = grad.to(normed.dtype) * weight
        # d x = (d n - n * mean(d n * n)) / rms, for n = x / rms
        along = (d_normed * normed).mean(dim=-1, keepdim=True)
        d_x = d_normed.addcmul_(normed, along, value=-1).mul_(inverse_rms)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4).

    megatron-core's own WrappedTorchNorm refuses sequence parallelism; here the weight is marked instead, so that
    `finalize_model_grads` sums its gradient over the tensor-parallel ranks, each of which sees only its own tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> the same shape and dtype; the mean is taken in float32 for half types."""
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)  # one fused kernel
        return _RmsNorm.apply(x, self.weight, self.eps)


class _SwiGlu(torch.autograd.Function):
    """For CPUs. Keeps its input only, and writes both halves of its gradient into one tensor: left to autograd, each half's
    gradient becomes a full-size tensor of its own, and the step takes ten times as long."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(linear)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_linear = d_x.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * linear, gate, grad_input=d_gate)
        torch.mul(F.silu(gate), grad, out=d_linear)
        return d_x


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2F], gate then linear -> silu(gate) * linear [..., F], same dtype (Shazeer 2020, arXiv 2002.05202)."""
    return _SwiGlu.apply(x)
