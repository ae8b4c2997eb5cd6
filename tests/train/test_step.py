"""What a step does with a loss or gradients that are not finite, and which rate it says it used."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from megadpo.config.schema import DpoConfig
from megadpo.data.batches.loader import GlobalBatch
from megadpo.train import step
from megadpo.train.step import NonFiniteLoss, StepOutcome, Trainer


def step_with(monkeypatch, loss, norm, on_nonfinite_loss):
    """The step around a forward and backward that gave `loss` and gradients of `norm`: its outcome, and the updates and
    steps of the schedule."""
    counts = {"updates": 0, "schedule": 0}
    group = {"lr": 0.25}

    def update(_, of_norm):
        assert of_norm == norm
        counts["updates"] += 1

    def schedule(increment):
        counts["schedule"] += increment
        group["lr"] = 0.125

    monkeypatch.setattr(step, "gradient_norm", lambda _: norm)
    monkeypatch.setattr(step, "update", update)
    trainer = SimpleNamespace(
        policy=[],
        balance=None,
        cfg=DpoConfig(on_nonfinite_loss=on_nonfinite_loss),
        optimizer=SimpleNamespace(zero_grad=lambda: None, param_groups=[group]),
        scheduler=SimpleNamespace(step=schedule),
        _ready=lambda batch: batch,
        _forward_backward=lambda batch: SimpleNamespace(means=lambda: {"loss": loss}),
    )
    batch = GlobalBatch(micro_batches=[], num_pairs=2, num_tokens=9, pair_indices=[5, 3])
    try:
        return Trainer.step(trainer, batch), counts
    except NonFiniteLoss as error:
        return str(error), counts


@pytest.mark.parametrize("on_nonfinite_loss", ["stop", "skip"])
def test_a_finite_step_updates_and_says_the_rate_it_used(on_nonfinite_loss, monkeypatch):
    outcome, counts = step_with(monkeypatch, 0.5, 3.0, on_nonfinite_loss)
    assert outcome == StepOutcome({"loss": 0.5}, grad_norm=3.0, lr=0.25, updated=True)
    assert counts == {"updates": 1, "schedule": 1}


@pytest.mark.parametrize(("loss", "norm"), [(math.inf, 3.0), (math.nan, 3.0), (0.5, math.inf)])
def test_what_is_not_finite_updates_nothing(loss, norm, monkeypatch):
    """An infinite loss may have finite gradients: where the reference gives a chosen answer -inf."""
    words, counts = step_with(monkeypatch, loss, norm, "stop")
    assert f"loss {loss}" in words and "[5, 3]" in words and counts == {"updates": 0, "schedule": 0}
    outcome, counts = step_with(monkeypatch, loss, norm, "skip")
    assert not outcome.updated and counts == {"updates": 0, "schedule": 1}, "the schedule counts batches"
