"""Norms, and the residual addition of families that need another than megatron-core's."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


class _RmsNorm(torch.autograd.Function):
    """Saves its input and one number for each row. (On CPUs torch's own saves three tensors of the input's size.)"""

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
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, eq. 4); with
    `layernorm_zero_centered_gamma` times (1 + weight), a sum in float32.

    megatron-core's WrappedTorchNorm refuses sequence parallelism. Here the weight is marked, so that
    `finalize_model_grads` sums its gradient over the tensor-parallel ranks, since each has only its own tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.centre = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.full((hidden_size,), 1.0 - self.centre, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] -> the same shape and dtype; the mean is taken in float32 for half types."""
        return rms_norm(x, self.weight, self.eps, centre=self.centre)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, centre: float) -> torch.Tensor:
    """RMSNorm's forward with any weight [hidden], to which `centre` is added in float32."""
    if centre:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + centre
    if x.is_cuda:  # one fused kernel; it needs equal dtypes
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)
    normed: torch.Tensor = _RmsNorm.apply(x, weight, eps)
    return normed


def norm_of_all_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    eps: float,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over all heads of a token together: of its queries, and of its keys. The mean square is over all ranks' heads.

    query [T, H, D] and key [T, G, D] of this rank's heads; weights of all heads. Every rank has the whole weights and uses
    its heads' part; megatron-core knows the weights by their names, and sums their gradients over the ranks.
    Collectives: an all-reduce of [T, 2] over `group`, forward and backward.
    """
    both, weights, ranks = (query, key), (query_weight, key_weight), group.size()
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in both]
    squares = torch.stack([x.square().sum(dim=(1, 2)) for x in wide], dim=-1)
    if ranks > 1:  # every rank uses the sum, so its gradient is summed as well
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
    normed = []
    for x, square, weight in zip(wide, squares.unbind(-1), weights, strict=True):
        scale = (square / weight.numel() + eps).rsqrt()
        normed.append(x * scale[:, None, None] * weight.view(ranks, *x.shape[1:])[group.rank()])
    return normed[0].to(query.dtype), normed[1].to(key.dtype)


class ResidualAdd(torch.nn.Module):
    """residual + multiplier * norm(x), in place of megatron-core's dropout and addition. For families with a norm after
    attention and MLP, or with a factor."""

    def __init__(self, config: TransformerConfig, norm: Any, multiplier: float) -> None:
        """norm: the class of the norm; None: there is none."""
        super().__init__()
        self.norm = None if norm is None else norm(config, config.hidden_size, config.layernorm_epsilon)
        self.multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Any:
        """Called by megatron-core. Returns a function of ((x, bias), residual, dropout)."""
        return self._add

    def _add(self, x_and_bias: Any, residual: torch.Tensor, dropout: float) -> torch.Tensor:
        x, bias = x_and_bias
        x = x if bias is None else x + bias
        x = x if self.norm is None else self.norm(x)
        return torch.add(residual, x, alpha=self.multiplier)
