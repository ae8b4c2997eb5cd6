"""The CPU's own forward and backward formulas against autograd of the plain ones in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megadpo.config.architecture import Experts, Mlp, Router
from megadpo.model.activation import gated
from megadpo.model.decoder import LayerModules, _experts
from megadpo.model.transformer_config import _activation
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
    ours = gated(Mlp(ffn_size=6, activation=activation, limit=0.5))(config=None)
    x = torch.randn(7, 1, 12, dtype=torch.float64, requires_grad=True)
    for got, want in zip(*both_gradients(ours, plain, [x]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("activation", "fused", "on_cuda"),
    itertools.product(("silu", "gelu_tanh", "clamped"), (True, False), (True, False)),
)
def test_megatron_core_takes_what_is_said_of_it(activation, fused, on_cuda):
    arch = SimpleNamespace(mlp=Mlp(ffn_size=6, activation=activation, limit=0.5), experts=None)
    options = _activation(arch, fused=fused, on_cuda=on_cuda)
    TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, gated_linear_unit=True, **options)
    assert options["use_te_activation_func"] == (fused and (activation == "clamped" or not on_cuda))


def test_megatron_cores_kernel_of_clamped_gates_clamps_before_it_adds_the_bias():
    """So it is not used; gpt-oss adds the bias first."""
    x, bias, weights = torch.randn(7, 12), torch.full((12,), 3.0), torch.ones(7, 1)
    with torch.compiler.set_stance("force_eager"):
        theirs = weighted_bias_quick_geglu_impl(x, bias, weights, False, 1.0, 0.5)
    assert not torch.allclose(theirs, plain_clamped(x + bias), rtol=0.1)
    clamped = torch.cat([x[:, :6].clamp(max=0.5), x[:, 6:].clamp(-0.5, 0.5)], dim=-1) + bias
    gate, linear = clamped.chunk(2, dim=-1)
    torch.testing.assert_close(theirs, gate * torch.sigmoid(1.702 * gate) * (1 + linear))


def test_experts_in_one_grouped_kernel_have_the_same_gates():
    """Without them megatron-core would take what TransformerConfig says, which stands for nothing here."""
    of = Experts(
        number=4,
        per_token=2,
        mlp=Mlp(ffn_size=6, activation="clamped", limit=0.5, bias=True),
        router=Router(scores="softmax_of_chosen"),
        shared_ffn_size=None,
        aux_loss_coef=0.0,
    )
    modules = LayerModules(norm=None, column=None, row=None, grouped_column="first", grouped_row="second")
    found = _experts(of, SimpleNamespace(moe_grouped_gemm=True), modules, object()).experts.submodules
    assert (found.linear_fc1, found.linear_fc2) == ("first", "second")
    x = torch.randn(3, 12)
    torch.testing.assert_close(found.activation_func(config=None)(x), plain_clamped(x))
