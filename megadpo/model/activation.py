"""Activations of gated MLPs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from megatron.core.transformer.module import MegatronModule
from torch.nn import functional as F

from megadpo.config.architecture import Mlp

ALPHA = 1.702
"""Factor inside the sigmoid of a clamped MLP, as in gpt-oss and megatron-core's quick_gelu."""

_GELU = functools.partial(F.gelu, approximate="tanh")
_GELU_BACKWARD = functools.partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh")


class _Glu(torch.autograd.Function):
    """function(gate) * linear. Saves only its input, and writes both halves of its gradient into one tensor.
    (autograd would make a full-size tensor for each half, and the step would take ten times as long.)"""

    @staticmethod
    def forward(ctx, x, function, function_backward):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.functions = function, function_backward
        gate, linear = x.chunk(2, dim=-1)
        return function(gate).mul_(linear)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        function, function_backward = ctx.functions
        gate, linear = x.chunk(2, dim=-1)
        d_x = torch.empty_like(x)
        d_gate, d_linear = d_x.chunk(2, dim=-1)
        function_backward(grad * linear, gate, grad_input=d_gate)
        torch.mul(function(gate), grad, out=d_linear)
        return d_x, None, None


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2F], gate then linear -> silu(gate) * linear [..., F], same dtype (Shazeer 2020, arXiv 2002.05202)."""
    return _Glu.apply(x, F.silu, torch.ops.aten.silu_backward.grad_input)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2F], gate then linear -> gelu(gate) * linear [..., F], same dtype (Shazeer 2020, arXiv 2002.05202)."""
    return _Glu.apply(x, _GELU, _GELU_BACKWARD)


class _ClampedGlu(torch.autograd.Function):
    """The clamped MLP's activation. Saves only its input, as _Glu does."""

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
    """The activation of a gated MLP, as a module without weights: x [..., 2F], gate then linear -> [..., F], same dtype.

    megatron-core builds it with `config=`; from 0.17 on it must be a module."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": swiglu,
        "gelu_tanh": geglu,
        "clamped": lambda x: _ClampedGlu.apply(x, mlp.limit),
    }
    function = functions[mlp.activation]

    class Gated(MegatronModule):  # megatron-core calls its sharded_state_dict
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return Gated
