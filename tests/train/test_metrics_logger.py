"""What holds for all loggers: who writes, what is refused, and how they are closed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megadpo.config.problems import ConfigError
from megadpo.train.loggers.tensorboard import TensorBoard
from megadpo.train.loggers.wandb import Wandb
from megadpo.train.metrics_logger import MetricsLogger
from tests.train.loggers.logs import logger_config, read_steps


def test_only_the_rank_that_is_told_so_writes(tmp_path: Path) -> None:
    cfg = logger_config(tmp_path / "logs", TensorBoard(), Wandb())
    with MetricsLogger(cfg, enabled=False) as logger:
        logger.log(1, {"train/loss": 0.5})
    assert not (tmp_path / "logs").exists()


def test_something_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with MetricsLogger(logger_config(tmp_path)) as logger:
        with pytest.raises(TypeError, match="train/loss: expected a number; got 'low'"):
            logger.log(1, {"train/loss": "low"})
        with pytest.raises(TypeError, match="got True"):
            logger.log(1, {"train/loss": True})
    assert read_steps(tmp_path / "metrics.jsonl") == []


def test_steps_do_not_go_backwards(tmp_path: Path) -> None:
    with MetricsLogger(logger_config(tmp_path), resumed_step=4) as logger:
        with pytest.raises(ValueError, match="step 3 after step 4"):
            logger.log(3, {"train/loss": 0.5})
        logger.log(4, {"validation-a/loss": 0.5})
        logger.log(5, {"train/loss": 0.5})
    assert read_steps(tmp_path / "metrics.jsonl") == [4, 5]


def test_an_error_while_closing_does_not_hide_what_ended_the_run(tmp_path: Path) -> None:
    class Broken:
        def log(self, step: int, metrics: object) -> None: ...

        def close(self, exit_code: int) -> None:
            raise OSError("closing failed")

    closed: list[int] = []

    class Healthy(Broken):
        def close(self, exit_code: int) -> None:
            closed.append(exit_code)

    logger = MetricsLogger(logger_config(tmp_path), enabled=False)
    logger._sinks = [Broken(), Healthy()]
    with pytest.raises(RuntimeError, match="the loss is nan"), logger:
        raise RuntimeError("the loss is nan")
    assert closed == [1]

    logger._sinks = [Broken(), Healthy()]
    with pytest.raises(OSError, match="closing failed"), logger:
        logger.exit_code = 143
    assert closed == [1, 143]
    logger.close()


def test_a_logger_that_fails_does_not_end_the_run_and_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away:
        def log(self, step: int, metrics: object) -> None:
            raise ConnectionError("no route to host\nand more")

        def close(self, exit_code: int) -> None:
            raise ConnectionError("still no route")

    monkeypatch.setattr(TensorBoard, "open", lambda self, run: Away())
    with MetricsLogger(logger_config(tmp_path, TensorBoard())) as logger:
        for step in range(1, 4):
            logger.log(step, {"train/loss": 0.5})
    assert read_steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    while_logging, at_the_end = caplog.messages
    assert while_logging.startswith("logger.tensorboard could not log step 1 (no route to host). The run goes on")
    assert at_the_end.startswith("logger.tensorboard could not be closed (still no route).")


def test_a_log_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refusal:
        MetricsLogger(logger_config(tmp_path / "file" / "logs"))
    (problem,) = refusal.value.problems
    assert problem.where == "logger.log_dir" and "can be written" in problem.expected


@pytest.mark.parametrize("enabled", [True, False], ids=["writing rank", "other rank"])
def test_a_client_that_is_not_installed_is_refused_at_the_start_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    cfg = logger_config(tmp_path / "logs", TensorBoard(), Wandb())
    with pytest.raises(ConfigError) as refusal:
        MetricsLogger(cfg, enabled=enabled)
    assert [problem.where for problem in refusal.value.problems] == [
        "logger.tensorboard_enabled",
        "logger.wandb_enabled",
    ]
    assert "pip install wandb" in refusal.value.problems[1].fix
    assert not (tmp_path / "logs").exists()
