"""The CPU's own forward and backward formulas against autograd of the plain ones in float64, and against bfloat16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megadpo.model.norm import ResidualAdd, RMSNorm


def plain_norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def config_of(dtype, zero_centred=False):
    return SimpleNamespace(
        params_dtype=dtype,
        sequence_parallel=False,
        hidden_size=12,
        layernorm_epsilon=1e-5,
        layernorm_zero_centered_gamma=zero_centred,
    )


def norm_of(weight, monkeypatch, **options):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    module = RMSNorm(config_of(weight.dtype, **options), weight.shape[0])
    module.weight = torch.nn.Parameter(weight)
    return module


def both_gradients(ours, plain, inputs):
    outs = ours(*inputs), plain(*inputs)
    upstream = torch.randn(outs[0].shape, dtype=outs[0].dtype)
    wanted = [x for x in inputs if x.requires_grad]
    grads = [torch.autograd.grad(out, wanted, upstream) for out in outs]
    return [outs[0], *grads[0]], [outs[1], *grads[1]]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("zero_centred", [False, True])
def test_norm(monkeypatch, zero_centred):
    x = torch.randn(5, 2, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, dtype=torch.float64)
    module = norm_of(weight, monkeypatch, zero_centred=zero_centred)

    def plain(x, weight):
        return plain_norm(x, weight + zero_centred)

    got, want = both_gradients(lambda x, w: module(x), plain, [x, module.weight])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_a_part_of_a_layer_adds(monkeypatch):
    """Without an upstream gradient nothing is kept, as in evaluation and in recomputed passes."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    config = config_of(torch.float64)
    x, residual, bias = (torch.randn(5, 12, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for norm in (None, RMSNorm):
        module = ResidualAdd(config, norm, 0.5)
        inner = x if norm is None else plain_norm(x, module.norm.weight)
        got, want = module(True, False)((x, None), residual, 0.0), residual + 0.5 * inner
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), [x, residual]) for out in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            assert not module(False, False)((x, bias), residual, 0.0).requires_grad
    torch.testing.assert_close(
        module(True, False)((x, bias), residual, 0.0), residual + 0.5 * plain_norm(x + bias, 1.0)
    )


def test_norm_in_bfloat16_takes_its_mean_in_float32(monkeypatch):
    x = (torch.randn(4, 512) * 30).bfloat16().requires_grad_()
    module = norm_of(torch.randn(512).bfloat16(), monkeypatch)
    out = module(x)
    (grad,) = torch.autograd.grad(out.float().sum(), x)
    assert out.dtype == grad.dtype == torch.bfloat16
    want = plain_norm(x.double(), module.weight.double())
    assert ((out - want).norm() / want.norm()) < 1.9e-3  # one rounding to bfloat16
