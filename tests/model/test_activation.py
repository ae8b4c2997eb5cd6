"""The CPU's own forward and backward formulas against autograd of the plain ones in float64."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from megadpo.model.activation import swiglu
from tests.model.test_norm import both_gradients


def plain_swiglu(x):
    gate, linear = x.chunk(2, dim=-1)
    return F.silu(gate) * linear


def test_swiglu():
    x = torch.randn(7, 1, 12, dtype=torch.float64, requires_grad=True)
    for got, want in zip(*both_gradients(swiglu, plain_swiglu, [x]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
