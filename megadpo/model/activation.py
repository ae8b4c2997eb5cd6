"""Activations of gated MLPs."""

from __future__ import annotations

import torch
from torch.nn import functional as F


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
