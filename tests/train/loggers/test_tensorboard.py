"""TensorBoard's event files, read by TensorBoard."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from megadpo.config.schema import LoggerConfig
from megadpo.train.loggers.tensorboard import TensorBoard
from megadpo.train.metrics_logger import MetricsLogger
from tests.train.loggers.logs import log_until_it_fails, logger_config, small_files_only


def tensorboard_scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def log_to_tensorboard(cfg: LoggerConfig, *, steps: range, resumed_step: int = 0) -> None:
    with MetricsLogger(cfg, resumed_step=resumed_step) as logger:
        for step in steps:
            logger.log(step, {"train/loss": step + resumed_step / 100})


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    cfg = logger_config(tmp_path, TensorBoard())
    log_to_tensorboard(cfg, steps=range(1, 6))
    log_to_tensorboard(cfg, steps=range(4, 7), resumed_step=3)
    found = tensorboard_scalars(tmp_path / "tensorboard", "train/loss")
    assert found == [
        (step, pytest.approx(value)) for step, value in [(1, 1), (2, 2), (3, 3), (4, 4.03), (5, 5.03), (6, 6.03)]
    ]


def test_tensorboard_hides_an_older_run_in_the_same_folder(tmp_path: Path) -> None:
    cfg = logger_config(tmp_path, TensorBoard(log_dir="tb"))
    log_to_tensorboard(cfg, steps=range(0, 6))
    log_to_tensorboard(cfg, steps=range(0, 2))
    assert tensorboard_scalars(tmp_path / "tb", "train/loss") == [(0, 0), (1, 1)]


def test_tensorboard_is_up_to_date_when_log_returns(tmp_path: Path) -> None:
    logger = MetricsLogger(logger_config(tmp_path, TensorBoard()))
    logger.log(1, {"train/loss": 0.5, "train/grad_norm": None})
    logger.log(2, {"train/loss": 0.25})  # TensorBoard writes the first value at once anyway
    assert tensorboard_scalars(tmp_path / "tensorboard", "train/loss") == [(1, 0.5), (2, 0.25)]
    logger.close()


def test_a_disk_that_fails_for_tensorboard_only_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # TensorBoard's own thread fails as well
    logged: list[int] = []
    os.symlink(os.devnull, tmp_path / "metrics.jsonl")  # this file never fills up
    cfg = logger_config(tmp_path, TensorBoard())
    with small_files_only(), MetricsLogger(cfg) as logger:
        log_until_it_fails(logger, logged)
    assert logged == list(range(1, 100))
    while_logging, *_ = caplog.messages
    assert "logger.tensorboard could not log step" in while_logging and "File too large" in while_logging
