"""A run whose checkpoint can't fit on the disk ends at its start; one that will fill the disk says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megadpo.checkpoint import unfinished_bytes
from megadpo.checkpoint.size import CheckpointBytes
from megadpo.config.problems import ConfigError
from megadpo.config.schema import CheckpointingConfig
from megadpo.train.disk_space import space_notes
from tests.checkpoint.test_choose import write_run
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, train_and_read

SIZE = CheckpointBytes(weights=200, with_optimizer=1400)


def disk(free: int, total: int = 10**9) -> Callable[[Any], SimpleNamespace]:
    """In place of shutil.disk_usage."""
    return lambda folder: SimpleNamespace(total=total, used=total - free, free=free)


def notes(folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, saves: int, **saving: Any) -> list[str]:
    monkeypatch.setattr(shutil, "disk_usage", disk(free))
    return space_notes(CheckpointingConfig(checkpoint_dir=str(folder), **saving), SIZE, saves)


def test_one_checkpoint_must_fit(tmp_path, monkeypatch):
    assert notes(tmp_path, monkeypatch, 1400, 1) == notes(tmp_path, monkeypatch, 200, 1, save_optimizer=False) == []
    with pytest.raises(ConfigError) as caught:
        notes(tmp_path, monkeypatch, 1399, 1)
    (problem,) = caught.value.problems
    assert (problem.where, problem.value) == ("checkpointing.checkpoint_dir", str(tmp_path))
    assert "1,400 bytes of tensors" in problem.expected and "1,399 bytes are free" in problem.expected
    assert "save_optimizer: false saves only 200 bytes" in problem.fix
    with pytest.raises(ConfigError) as caught:
        notes(tmp_path, monkeypatch, 199, 1)
    assert "save_optimizer" not in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("there", "saves", "saving", "most"),
    [
        (0, 3, {}, 3),  # all are kept
        (0, 9, {"keep_top_k": 2}, 3),  # and one being written
        (0, 9, {"keep_top_k": 2, "metric_name": "train:loss"}, 4),  # and the newest
        (0, 2, {"keep_top_k": 4}, 2),  # no more than the run saves
        (2, 9, {"keep_top_k": 4}, 3),  # those that are there are not counted again
    ],
)
def test_what_is_kept_is_noted_where_it_does_not_fit(tmp_path, monkeypatch, there, saves, saving, most):
    write_run(tmp_path, {step: {} for step in range(1, 1 + there)})
    assert notes(tmp_path, monkeypatch, 1400 * most, saves, **saving) == []
    (note,) = notes(tmp_path, monkeypatch, 1400 * most - 1, saves, **saving)
    assert f"{most} more checkpoints" in note and f"{1400 * most:,} bytes" in note


def test_a_resumed_run_that_keeps_no_more_needs_one(tmp_path, monkeypatch):
    write_run(tmp_path, {step: {} for step in range(1, 8)})
    assert notes(tmp_path, monkeypatch, 1400, 9, keep_top_k=3) == []


@pytest.mark.parametrize("usage", [disk(0, 0), disk(0), disk(20, 10), disk(-1)])
def test_a_file_system_that_counts_nothing_is_believed_nothing(tmp_path, monkeypatch, usage):
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert space_notes(CheckpointingConfig(checkpoint_dir=str(tmp_path)), SIZE, 5) == []


def test_nor_is_one_that_cannot_be_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (_ for _ in ()).throw(OSError(38, "not there")))
    assert space_notes(CheckpointingConfig(checkpoint_dir=str(tmp_path)), SIZE, 5) == []


def test_what_a_killed_run_left_unfinished_counts_as_free(tmp_path, monkeypatch):
    model = tmp_path / ".step_9.partial" / "model"
    model.mkdir(parents=True)
    (model / "__0_0.distcp").write_bytes(b"x" * 100_000)
    (tmp_path / "step_8").mkdir()
    (tmp_path / "step_8" / "kept").write_bytes(b"x" * 100_000)
    assert 100_000 <= unfinished_bytes(tmp_path) < 200_000
    assert notes(tmp_path, monkeypatch, 10, 1) == []


def train_on_a_small_disk(config: str, free: int) -> tuple[int, str]:
    """Target for run_distributed. Where weights are loaded, it is too late."""
    import megadpo.train.setup

    shutil.disk_usage = disk(free)  # type: ignore[assignment]
    megadpo.train.setup.build_policy = None  # type: ignore[assignment]
    return train_and_read(config, [])


@pytest.mark.distributed
def test_a_run_is_refused_before_it_loads_weights(tmp_path):
    """Two ranks, both of which end with 2."""
    model = make_model(tmp_path / "model")
    config = make_config(tmp_path, model, checkpointing={"enabled": True})
    refused = run_distributed(train_on_a_small_disk, 2, str(config), 1000, init_process_group=False)
    assert [code for code, _ in refused] == [2, 2]
    assert "1,000 bytes are free;" in refused[0][1] and "checkpointing.checkpoint_dir" in refused[0][1]
