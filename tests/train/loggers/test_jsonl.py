"""metrics.jsonl: what is written, what a resume sets aside, and a disk that fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megadpo.train.metrics_logger import MetricsLogger
from tests.train.loggers.logs import log_until_it_fails, logger_config, read_steps, small_files_only, write_run


def superseded_files(log_dir: Path) -> list[Path]:
    return sorted(log_dir.glob("metrics.superseded-*.jsonl"))


def test_one_object_per_call_with_plain_numbers(tmp_path: Path) -> None:
    with MetricsLogger(logger_config(tmp_path / "new" / "logs")) as logger:
        logger.log(1, {"epoch": 0, "train/loss": torch.tensor(0.5), "train/lr": np.float32(0.25), "train/num_pairs": 8})
        logger.log(2, {"epoch": 0, "train/loss": 0.25, "validation-a/loss": None})
    lines = (tmp_path / "new" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "epoch": 0, "train/loss": 0.5, "train/lr": 0.25, "train/num_pairs": 8}'
    assert json.loads(lines[1]) == {"step": 2, "epoch": 0, "train/loss": 0.25, "validation-a/loss": None}


def test_every_line_is_in_the_file_when_log_returns(tmp_path: Path) -> None:
    logger = MetricsLogger(logger_config(tmp_path))
    logger.log(1, {"train/loss": 0.5})
    assert read_steps(tmp_path / "metrics.jsonl") == [1]
    logger.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_null_so_that_every_line_is_json(tmp_path: Path, value: float) -> None:
    with MetricsLogger(logger_config(tmp_path)) as logger:
        logger.log(1, {"train/loss": value})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {"step": 1, "train/loss": None}


def test_a_resumed_run_has_each_step_once_and_loses_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, steps=range(0, 8))
    write_run(tmp_path, steps=range(6, 11), resumed_step=5)
    assert read_steps(tmp_path / "metrics.jsonl") == list(range(11))
    (aside,) = superseded_files(tmp_path)
    assert read_steps(aside) == [6, 7]


def test_resuming_twice_in_a_second_keeps_both_leftovers(tmp_path: Path) -> None:
    write_run(tmp_path, steps=range(1, 6))
    write_run(tmp_path, steps=range(4, 6), resumed_step=3)
    write_run(tmp_path, steps=range(3, 4), resumed_step=2)
    assert read_steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert sorted(read_steps(path) for path in superseded_files(tmp_path)) == [[3, 4, 5], [4, 5]]


def test_nothing_is_touched_when_nothing_was_logged_after_the_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, steps=range(1, 4))
    before = (tmp_path / "metrics.jsonl").stat()
    write_run(tmp_path, steps=range(0), resumed_step=3)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert superseded_files(tmp_path) == []


def test_a_run_from_nothing_sets_an_older_run_aside(tmp_path: Path) -> None:
    write_run(tmp_path, steps=range(0, 4))
    write_run(tmp_path, steps=range(0, 2))
    assert read_steps(tmp_path / "metrics.jsonl") == [0, 1]
    (aside,) = superseded_files(tmp_path)
    assert read_steps(aside) == [0, 1, 2, 3]


@pytest.mark.parametrize("torn", [b'{"step": 2, "train/lo', b'{"train/loss": 1.0}', b"[2]", b"\xff\xfe"])
def test_a_line_cut_short_is_set_aside(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    write_run(tmp_path, steps=range(3, 4), resumed_step=2)
    assert read_steps(path) == [1, 3]
    (aside,) = superseded_files(tmp_path)
    assert aside.read_bytes() == torn + b"\n"


def test_a_whole_line_without_its_newline_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    write_run(tmp_path, steps=range(3, 4), resumed_step=2)
    assert read_steps(path) == [1, 2, 3]


def test_a_failing_disk_raises_at_the_line_that_was_cut_short(tmp_path: Path) -> None:
    logged: list[int] = []
    with (
        small_files_only(),
        pytest.raises(OSError, match="File too large"),
        MetricsLogger(logger_config(tmp_path)) as logger,
    ):
        log_until_it_fails(logger, logged)
    *whole, cut_short = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["step"] for line in whole] == logged and logged
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut_short)
