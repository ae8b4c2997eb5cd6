"""Whole runs with rankings, rewards and weights of rows: their first loss, known beforehand, and the same on every layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.equal_runs import Outcome, assert_equal_runs, run
from tests.helpers.overrides import CP2, DIST, PP2, TP2
from tests.helpers.runs import make_config, make_model, make_pairs, ranked_pairs, train_and_read
from tests.train.test_layouts import EMPTY_PACKS

LOSS = "dpo.loss_type=plackett_luce"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """run(name, processes, overrides): three rankings of four answers in a global batch."""
    folder = tmp_path_factory.mktemp("rankings")
    data = {
        "train_data_path": str(ranked_pairs(folder / "train.jsonl", prompts=10, answers=4, seed=0)),
        "val_data_paths": {"held_out": str(ranked_pairs(folder / "valid.jsonl", prompts=4, answers=3, seed=1))},
    }
    model = make_model(folder / "qwen3", "qwen3")

    def start(name: str, processes: int, overrides: list[str]) -> Outcome:
        policy = {"train_global_batch_size": 3, "sequence_packing": {"train_mb_tokens": 260}}
        dpo = {"sft_loss_weight": 0.0, "val_global_batch_size": 2}
        return run(folder / name, model, processes, [LOSS, *overrides], policy=policy, data=data, dpo=dpo)

    return start


@pytest.fixture(scope="module")
def alone(started):  # type: ignore[no-untyped-def]
    return started("alone", 1, [])


def test_every_order_of_four_is_as_likely_at_the_start(alone: Outcome) -> None:
    first, second, _ = (record for record in alone.metrics if "train/loss" in record)
    assert first["train/loss"] == pytest.approx(math.log(24), rel=1e-6)
    assert first["train/num_pairs"] == 18
    assert second["train/loss"] != pytest.approx(math.log(24), rel=1e-4)
    (validated,) = (record for record in alone.metrics if "validation-held_out/loss" in record)
    assert 0 < validated["validation-held_out/loss"] < 2 * math.log(6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "processes", "overrides"),
    [("dp2_cached", 2, [DIST, "dpo.reference.mode=cached"]), ("tp2_pp2", 4, [TP2, PP2]), ("cp2", 2, [CP2])],
)
def test_the_same_on_every_layout(name: str, processes: int, overrides: list[str], started, alone) -> None:  # type: ignore[no-untyped-def]
    print(name, assert_equal_runs(started(name, processes, overrides), alone))


def test_weights_and_rewards_of_rows(tmp_path: Path) -> None:
    """At the start the loss is ln 2 times the mean weight, and of rpo the divergence of the rewards' sigmoid from 1/2."""
    rows = [json.loads(line) for line in make_pairs(tmp_path / "plain.jsonl", 8).read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"weight": number / 4, "chosen_reward": 2.0, "rejected_reward": 0.5}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model(tmp_path / "model")
    data = {"train_data_path": str(tmp_path / "train.jsonl"), "val_data_paths": None}
    found = {}
    for name, overrides in {"sigmoid": [], "rpo": ["dpo.loss_type=rpo", "dpo.rpo_reward_scale=2"]}.items():
        outcome = run(tmp_path / name, model, 1, ["dpo.sft_loss_weight=0", "dpo.val_period=0", *overrides], data=data)
        found[name] = outcome.metrics[0]["train/loss"]
    mean = sum(number / 4 for number in range(8)) / 8
    p = 1 / (1 + math.exp(-3))
    assert found["sigmoid"] == pytest.approx(mean * math.log(2), rel=1e-6)
    assert found["rpo"] == pytest.approx(mean * (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p)), rel=1e-6)


@pytest.mark.distributed
def test_rewards_with_ranks_without_a_pair(tmp_path: Path) -> None:
    """In global batches of 4 pairs, and of 3 in the last one of the validation set."""
    model, data = make_model(tmp_path / "model"), {}
    for number, count in enumerate((40, 11)):
        path = make_pairs(tmp_path / f"{count}.jsonl", count, seed=number)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row, pair in enumerate(rows):
            pair |= {"chosen_reward": row % 5 / 2, "rejected_reward": 0.25}
        path.write_text("".join(json.dumps(pair) + "\n" for pair in rows))
        data[count] = str(path)
    sections = {"data": {"train_data_path": data[40], "val_data_paths": {"held_out": data[11]}}}
    sections["dpo"] = {"val_global_batch_size": 4, "val_batches": 0}
    rpo = ["dpo.loss_type=rpo", *EMPTY_PACKS]
    one = run(tmp_path / "one", model, 1, rpo, **sections)
    assert_equal_runs(run(tmp_path / "dp4", model, 4, rpo, **sections), one)


def test_what_it_needs_is_refused_by_name(tmp_path: Path) -> None:
    config = make_config(tmp_path, make_model(tmp_path / "model"), pairs=8)
    needs = ["data.group_prompts=false", "dpo.ld_alpha=0.5", "dpo.use_weighting=true"]
    for overrides in ([LOSS, *needs], ["dpo.loss_type=rpo"]):
        ((code, printed),) = run_distributed(train_and_read, 1, str(config), overrides, init_process_group=False)
        assert code == 2
        wanted = (
            [need.partition("=")[0] for need in needs]
            if LOSS in overrides
            else ["a pair without rewards", "8 of 8 pairs"]
        )
        assert all(one in printed for one in wanted), printed
