"""The CPU's own forward and backward formulas against autograd of the plain ones in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megadpo.config.architecture import Mlp
from megadpo.model.activation import gated
from tests.model.test_norm import both_gradients


def plain_swiglu(x):
    gate, linear = x.chunk(2, dim=-1)
    return F.silu(gate) * linear


def plain_geglu(x):
    gate, linear = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * linear


def plain_clamped(x):
    gate, linear = x.chunk(2, dim=-1)
    gate = gate.clamp(max=0.5)
    return gate * torch.sigmoid(1.702 * gate) * (1 + linear.clamp(-0.5, 0.5))


@pytest.mark.parametrize(
    ("activation", "plain"), [("silu", plain_swiglu), ("gelu_tanh", plain_geglu), ("clamped", plain_clamped)]
)
def test_gated(activation, plain):
    ours = gated(Mlp(ffn_size=6, activation=activation, limit=0.5))
    x = torch.randn(7, 1, 12, dtype=torch.float64, requires_grad=True)
    for got, want in zip(*both_gradients(ours, plain, [x]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
