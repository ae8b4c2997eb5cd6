"""Activations of gated MLPs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from megadpo.config.architecture import Mlp

ALPHA = 1.702
"""Of the sigmoid that gates a clamped MLP, as gpt-oss has it and megatron-core's quick_gelu."""


class _SwiGlu(torch.autograd.Function):
    """Keeps its input only, and writes both halves of its gradient into one tensor: left to autograd, each half's
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


class _GatedGelu(torch.autograd.Function):
    """As _SwiGlu, with GELU in its form with tanh."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(linear)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_linear = d_x.chunk(2, dim=-1)
        torch.ops.aten.gelu_backward.grad_input(grad * linear, gate, approximate="tanh", grad_input=d_gate)
        torch.mul(F.gelu(gate, approximate="tanh"), grad, out=d_linear)
        return d_x


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2F], gate then linear -> gelu(gate) * linear [..., F], same dtype (Shazeer 2020, arXiv 2002.05202)."""
    return _GatedGelu.apply(x)


class _ClampedGlu(torch.autograd.Function):
    """As _SwiGlu: its input is all that is kept."""

    @staticmethod
    def forward(ctx, x, limit):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.limit = limit
        gate, linear = x.chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return gate.mul(torch.sigmoid(gate * ALPHA)).mul_(linear.clamp(-limit, limit).add_(1))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_linear = d_x.chunk(2, dim=-1)
        clamped = gate.clamp(max=ctx.limit)
        share = torch.sigmoid(clamped * ALPHA)
        # d (g s(a g)) / d g = s + a g s (1 - s)
        slope = torch.addcmul(share, clamped * ALPHA, share * (1 - share))
        torch.mul(grad, linear.clamp(-ctx.limit, ctx.limit).add_(1), out=d_gate).mul_(slope).mul_(gate <= ctx.limit)
        torch.mul(grad, clamped.mul_(share), out=d_linear).mul_(linear.abs() <= ctx.limit)
        return d_x, None


def gated(mlp: Mlp) -> type[MegatronModule]:
    """The activation of a gated MLP, a module without weights: x [..., 2F], gate then linear -> [..., F], same dtype.

    megatron-core builds it with `config=`; from 0.17 on it accepts nothing but a module."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": swiglu,
        "gelu_tanh": geglu,
        "clamped": lambda x: _ClampedGlu.apply(x, mlp.limit),
    }
    function = functions[mlp.activation]

    class Gated(MegatronModule):  # whose sharded_state_dict megatron-core asks for
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return Gated
