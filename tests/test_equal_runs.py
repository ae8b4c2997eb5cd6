"""The comparison of two runs must notice what it is for: one metric, one step, one rank's copy of one weight."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.helpers.equal_runs import Outcome, Piece, assert_equal_runs, largest_difference

NAMES = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "moe_aux_loss")


def a_run():
    """Two steps; weight `w` in two parts, the second held twice, and `v` whole."""
    record = {f"train/{name}": 0.5 for name in NAMES}
    record |= {
        "train/logps/chosen": -40.0,
        "train/num_tokens": 90,
        "train/lr": 1e-3,
        "epoch": 0,
        "timing/train/step_time_s": 0.1,
    }
    parts = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).split(2)
    pieces = [Piece("w", (3, 4), (0, 0), parts[0]), Piece("w", (3, 4), (2, 0), parts[1])]
    pieces += [Piece("w", (3, 4), (2, 0), parts[1].clone()), Piece("v", (4,), (0,), torch.ones(4))]
    return Outcome([{"step": step, **record} for step in (1, 2)], pieces)


def changed(step=None, name=None, value=None, piece=None):
    run = copy.deepcopy(a_run())
    if name is not None:
        run.metrics[step - 1][name] = value
    if piece is not None:
        run.pieces[piece].data = run.pieces[piece].data * (1 + 1e-4)
    return run


def test_equal_runs_are_equal():
    assert assert_equal_runs(a_run(), a_run()).relative == 0
    assert assert_equal_runs(changed(2, "timing/train/step_time_s", 9.0), a_run()).relative == 0
    assert assert_equal_runs(changed(1, "train/rewards/accuracies", 1.0), a_run()).relative == 0


@pytest.mark.parametrize("name", NAMES)
def test_any_metric_of_any_step_counts(name):
    value = a_run().metrics[1][f"train/{name}"]
    with pytest.raises(AssertionError, match=f"step 2 train/{name}"):
        assert_equal_runs(changed(2, f"train/{name}", value + 1e-3), a_run())


def test_a_reward_is_held_against_the_logps_it_comes_from():
    found = largest_difference(changed(2, "train/rewards/margins", 0.5 + 2e-5), a_run())
    assert found.relative == pytest.approx(2e-5 / (0.1 * 40))


def test_a_number_that_is_none_is_the_largest_difference():
    with pytest.raises(AssertionError, match="train/loss"):
        assert_equal_runs(changed(1, "train/loss", math.nan), a_run())


@pytest.mark.parametrize(("name", "value"), [("train/lr", 1.000001e-3), ("epoch", 1), ("train/num_tokens", 91)])
def test_what_must_be_the_same_exactly(name, value):
    with pytest.raises(AssertionError, match=name):
        assert_equal_runs(changed(2, name, value), a_run())


def test_tokens_may_differ_where_prompts_are_not_shared():
    assert_equal_runs(changed(2, "train/num_tokens", 91), a_run(), same_tokens=False)


def test_a_metric_too_many_or_too_few():
    for got, want in ((changed(2, "train/new", 1.0), a_run()), (a_run(), changed(2, "train/new", 1.0))):
        with pytest.raises(AssertionError):
            assert_equal_runs(got, want)


@pytest.mark.parametrize("piece", range(4))
def test_every_copy_of_every_weight_counts(piece):
    with pytest.raises(AssertionError, match=f"{a_run().pieces[piece].name} after the last step"):
        assert_equal_runs(changed(piece=piece), a_run())


def test_a_part_that_no_rank_holds():
    run = a_run()
    del run.pieces[0]
    with pytest.raises(AssertionError, match="no rank holds all of"):
        assert_equal_runs(run, a_run())
