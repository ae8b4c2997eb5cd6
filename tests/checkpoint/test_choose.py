"""Which checkpoint of a run's folder is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadpo.checkpoint.choose import checkpoints_in, choose_checkpoint
from megadpo.config.problems import ConfigError

VALIDATION = "validation-a/loss"


def write_run(folder: Path, measured: dict[int, dict[str, Any]], **saving: Any) -> Path:
    """A run's folder with a checkpoint for each step, as far as choosing looks at it."""
    cfg = {"checkpointing": {"metric_name": None, "higher_is_better": False} | saving}
    cfg["data"] = {"val_data_paths": {"a": "a.jsonl"}}
    for step, metrics in measured.items():
        checkpoint = folder / f"step_{step}"
        (checkpoint / "hf").mkdir(parents=True)
        record = {"format": 1, "position": {"step": step, "epoch": 0, "batch": step, "metrics": metrics}}
        record |= {"world_size": 1, "layout": "", "has_optimizer": False, "optimizer_format": ""}
        (checkpoint / "megadpo.json").write_text(json.dumps(record))
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(cfg))
    return folder


MEASURED = {9: {VALIDATION: 0.4, "train/loss": 0.1}, 10: {VALIDATION: 0.3}, 100: {VALIDATION: None, "train/loss": 0.9}}


@pytest.mark.parametrize(("asked", "step"), [
    ({}, 100), ({"step": 9}, 9), ({"best": True}, 10),
])  # fmt: skip
def test_the_newest_one_by_its_step_and_the_best(tmp_path: Path, asked: dict[str, Any], step: int) -> None:
    folder = write_run(tmp_path / "run", MEASURED)
    assert choose_checkpoint(folder, **asked) == folder / f"step_{step}"


@pytest.mark.parametrize(("saving", "step"), [
    ({"metric_name": "validation-a_loss"}, 10),
    ({"metric_name": "validation-a_loss", "higher_is_better": True}, 9),
    ({"metric_name": "train:loss"}, 9),
])  # fmt: skip
def test_the_best_is_by_the_runs_own_metric(tmp_path: Path, saving: dict[str, Any], step: int) -> None:
    folder = write_run(tmp_path / "run", MEASURED, **saving)
    assert choose_checkpoint(folder, best=True) == folder / f"step_{step}"


def test_of_equals_the_newest_is_best(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {1: {VALIDATION: 0.5}, 2: {VALIDATION: 0.5}})
    assert choose_checkpoint(folder, best=True).name == "step_2"


def test_a_checkpoint_stands_for_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", MEASURED)
    assert choose_checkpoint(folder / "step_9") == folder / "step_9" and checkpoints_in(folder / "step_9") == [
        folder / "step_9"
    ]
    assert [path.name for path in checkpoints_in(folder)] == ["step_9", "step_10", "step_100"]
    with pytest.raises(ConfigError, match="leave --step and --best out"):
        choose_checkpoint(folder / "step_9", best=True)


@pytest.mark.parametrize(("asked", "words"), [
    ({"step": 11}, "--step: got 11; expected one of 9, 10, 100"),
    ({"best": True}, "with one validation set .it measured .'validation-a/loss', 'validation-b/loss'"),
])  # fmt: skip
def test_what_is_not_there_is_refused(tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    measured = {**MEASURED, 100: {VALIDATION: 0.1, "validation-b/loss": 0.2}}
    with pytest.raises(ConfigError, match=words):
        choose_checkpoint(write_run(tmp_path / "run", measured), **asked)


def test_the_folder_above_a_run_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "results/run", MEASURED)
    with pytest.raises(ConfigError, match=f"did you mean {tmp_path}/results/run"):
        choose_checkpoint(tmp_path / "results")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        choose_checkpoint(tmp_path / "nowhere")


def test_a_metric_that_no_checkpoint_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {1: {}}, metric_name="validation-a_loss")
    with pytest.raises(ConfigError, match="--best: got 'validation-a/loss'"):
        choose_checkpoint(folder, best=True)
