"""An update clips gradients wherever the optimizer keeps them, by a norm that is right for tensors of any length."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megadpo.optimizer import step
from megadpo.optimizer.step import gradient_norm, update
from megadpo.parallel.cpu import enable_cpu


class OnePart:
    """What the two use of megatron-core's optimizers, around one parameter."""

    def __init__(self, parameter, *, decoupled, clip_grad=1.0):
        self.parameter = parameter
        self.config = SimpleNamespace(clip_grad=clip_grad, use_precision_aware_optimizer_no_fp8_or_ds_fp8=decoupled)
        self.stepped = False

    def prepare_grads(self):
        return False

    def get_grad_norm(self):
        grad = self.parameter.grad
        return (self.parameter.decoupled_grad if grad is None else grad).norm()

    def get_parameters(self):
        return [self.parameter]

    def step_with_ready_grads(self):
        self.stepped = True


@pytest.mark.parametrize("decoupled", [False, True])
def test_clips_and_steps(decoupled):
    if not torch.cuda.is_available():
        enable_cpu()
    parameter = torch.nn.Parameter(torch.zeros(4))
    setattr(parameter, "decoupled_grad" if decoupled else "grad", torch.full((4,), 3.0))
    part = OnePart(parameter, decoupled=decoupled)
    assert gradient_norm(part) == 6.0 and not part.stepped
    update(part, 6.0)
    left = parameter.decoupled_grad if decoupled else parameter.grad
    torch.testing.assert_close(left.norm(), torch.tensor(1.0), rtol=1e-5, atol=0)
    assert part.stepped


def test_without_a_limit_gradients_stay_as_they_are():
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3.0)
    part = OnePart(parameter, decoupled=False, clip_grad=0.0)
    update(part, gradient_norm(part))
    assert part.stepped
    assert parameter.grad.tolist() == [3.0] * 4


@pytest.mark.parametrize("values", ["random", "equal"])
def test_the_norm_of_a_long_tensor_is_exact(values):
    block = torch.randn(2**16, generator=torch.Generator().manual_seed(0))
    block = block if values == "random" else torch.full_like(block, 0.1234567)
    long = block.repeat(2**11)  # 2^27 elements, whose norm torch's kernel for a CPU gets wrong by a per cent
    short = torch.full((5,), 100.0)
    want = (float(block.double().square().sum()) * 2**11 + 5e4) ** 0.5
    norm, _ = step._l2_norm(2048, torch.zeros(1), [[long, short, torch.zeros(0)]], False)
    assert norm.dtype == torch.float32 and norm.shape == (1,)
    assert float(norm) == pytest.approx(want, rel=1e-6)


def test_the_norm_says_what_is_not_finite():
    for value in (float("nan"), float("inf")):
        norm, _ = step._l2_norm(2048, torch.zeros(1), [[torch.zeros(5000), torch.tensor([[1.0, value]])]], False)
        assert not norm.isfinite().any()
