"""Helpers of the loggers' tests: configs, written runs, and a disk that fails."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadpo.config.schema import LoggerConfig
from megadpo.config.variants import LOGGERS
from megadpo.train.metrics_logger import MetricsLogger


def logger_config(log_dir: Path, *loggers: Any) -> LoggerConfig:
    """The section with these loggers switched on."""
    on = {key: value for one in loggers for key, value in ((f"{one.key}_enabled", True), (one.key, one))}
    return LoggerConfig(log_dir=str(log_dir), loggers=LOGGERS.defaults() | on)


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_run(log_dir: Path, *, steps: range, resumed_step: int = 0) -> None:
    with MetricsLogger(logger_config(log_dir), resumed_step=resumed_step) as logger:
        for step in steps:
            logger.log(step, {"train/loss": float(step)})


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """The kernel refuses to let any file of this process grow past 300 bytes (EFBIG), as a full disk would. Not a fixture:
    pytest's own output may go to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def log_until_it_fails(logger: MetricsLogger, logged: list[int]) -> None:
    for step in range(1, 100):
        logger.log(step, {"train/loss": 0.5})
        logged.append(step)
