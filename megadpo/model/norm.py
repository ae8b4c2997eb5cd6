"""Norms, and what adds a part of a layer to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F


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


class ResidualAdd(torch.nn.Module):
    """residual + multiplier * norm(x), where megatron-core has its dropout: for families that norm what a part of a layer
    gives, or weigh it."""

    def __init__(self, config: TransformerConfig, norm: Any, multiplier: float) -> None:
        """norm: the class of the norm; None: there is none."""
        super().__init__()
        self.norm = None if norm is None else norm(config, config.hidden_size, config.layernorm_epsilon)
        self.multiplier = multiplier

    def forward(self, training: bool, fused: bool) -> Any:
        """megatron-core's way to call it: what it returns takes ((x, bias), residual, dropout)."""
        return self._add

    def _add(self, x_and_bias: Any, residual: torch.Tensor, dropout: float) -> torch.Tensor:
        x, bias = x_and_bias
        x = x if bias is None else x + bias
        x = x if self.norm is None else self.norm(x)
        return torch.add(residual, x, alpha=self.multiplier)
