"""metrics.jsonl, TensorBoard, the real clients of wandb and MLflow: what is written, on resume, and when something is wrong."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.config.problems import ConfigError
from megadpo.config.schema import LoggerConfig
from megadpo.config.variants import LOGGERS
from megadpo.train.loggers.mlflow import MLflow
from megadpo.train.loggers.tensorboard import TensorBoard
from megadpo.train.loggers.wandb import Wandb
from megadpo.train.metrics_logger import MetricsLogger


def logger_config(log_dir: Path, *loggers: Any) -> LoggerConfig:
    """The section with these loggers switched on."""
    on = {key: value for one in loggers for key, value in ((f"{one.key}_enabled", True), (one.key, one))}
    return LoggerConfig(log_dir=str(log_dir), loggers=LOGGERS.defaults() | on)


def read_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def superseded_files(log_dir: Path) -> list[Path]:
    return sorted(log_dir.glob("metrics.superseded-*.jsonl"))


def write_run(log_dir: Path, *, steps: range, resumed_step: int = 0) -> None:
    with MetricsLogger(logger_config(log_dir), resumed_step=resumed_step) as logger:
        for step in steps:
            logger.log(step, {"train/loss": float(step)})


# --- metrics.jsonl -------------------------------------------------------------------------------------------------


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


# --- resuming --------------------------------------------------------------------------------------------------------


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


# --- a failing disk --------------------------------------------------------------------------------------------------


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


def test_a_disk_that_fails_for_tensorboard_only_raises_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # TensorBoard's own thread fails as well
    logged: list[int] = []
    os.symlink(os.devnull, tmp_path / "metrics.jsonl")  # this file never fills up
    cfg = logger_config(tmp_path, TensorBoard())
    with small_files_only(), pytest.raises(OSError, match="File too large"), MetricsLogger(cfg) as logger:
        log_until_it_fails(logger, logged)
    assert len(logged) < 20  # it raised while logging, not only on closing


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
    with pytest.raises(OSError, match="closing failed"):
        logger.close()
    assert closed == [1, 0]
    logger.close()


def test_a_log_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as refusal:
        MetricsLogger(logger_config(tmp_path / "file" / "logs"))
    (problem,) = refusal.value.problems
    assert problem.where == "logger.log_dir" and "can be written" in problem.expected


# --- TensorBoard -----------------------------------------------------------------------------------------------------


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


# --- wandb, the real client ------------------------------------------------------------------------------------------


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    wandb.teardown()  # the client reads the environment once a process
    yield tmp_path / "logs"
    wandb.teardown()


def wandb_records(file: Path) -> list[Any]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format.

    Only records in one piece (type 1) within the first 32 KiB block, which is all that a few steps fill.
    """
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    data, at, records = file.read_bytes(), 7, []
    assert len(data) < 32768
    while at < len(data):
        _checksum, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1
        records.append(wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length]))
        at += 7 + length
    return records


def wandb_history(run_folder: Path) -> list[dict[str, float]]:
    """The rows of a finished run. The client's service process may write them just after `finish` returns."""
    (file,) = run_folder.glob("run-*.wandb")
    deadline = time.monotonic() + 30
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(file)):
        assert time.monotonic() < deadline, f"{file} was never finished"
        time.sleep(0.05)
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(file)
        if record.WhichOneof("record_type") == "history"
    ]


def test_wandb_writes_an_offline_run_and_resumes_it_under_the_same_id(wandb_offline: Path) -> None:
    cfg = logger_config(wandb_offline, Wandb(project="megadpo-test", name="offline"))
    with MetricsLogger(cfg, run_config={"dpo": {"seed": 42}}) as logger:
        logger.log(1, {"train/loss": 0.75})
        logger.log(2, {"train/loss": 0.5, "validation-a/loss": None})
    (folder,) = (wandb_offline / "wandb").glob("offline-run-*")
    run_id = (wandb_offline / "wandb_run_id").read_text().strip()
    assert (folder / f"run-{run_id}.wandb").exists()
    rows = wandb_history(folder)
    assert [(row["_step"], row["train/loss"]) for row in rows] == [(1, 0.75), (2, 0.5)]

    with MetricsLogger(cfg, resumed_step=2) as logger:
        logger.log(3, {"train/loss": 0.25})
    assert (wandb_offline / "wandb_run_id").read_text().strip() == run_id
    (second,) = set((wandb_offline / "wandb").glob("offline-run-*")) - {folder}
    assert (second / f"run-{run_id}.wandb").exists()

    with MetricsLogger(cfg):  # from nothing: a run of its own
        pass
    assert (wandb_offline / "wandb_run_id").read_text().strip() != run_id


def test_the_mode_in_the_config_decides_over_the_environment(
    wandb_offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cfg = logger_config(wandb_offline, Wandb(mode="offline"))
    with MetricsLogger(cfg) as logger:
        logger.log(1, {"train/loss": 0.75})
    (folder,) = (wandb_offline / "wandb").glob("offline-run-*")
    assert wandb_history(folder)[0]["train/loss"] == 0.75


def test_settings_that_wandb_refuses_are_a_config_error(wandb_offline: Path) -> None:
    cfg = logger_config(wandb_offline, Wandb(project="a/b"))
    with pytest.raises(ConfigError) as refusal:
        MetricsLogger(cfg)
    assert "logger.wandb: got {'project': 'a/b'}" in str(refusal.value)
    assert "logger.wandb_enabled: false" in str(refusal.value)


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


def test_a_folder_named_wandb_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricsLogger(logger_config(tmp_path / "logs", Wandb()), enabled=False)


# --- MLflow, its real file store -------------------------------------------------------------------------------------


@pytest.fixture
def mlflow_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the folder that a run in tmp_path/logs writes to."""
    pytest.importorskip("mlflow", reason="needs `pip install mlflow-skinny`")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=str(tmp_path / "logs" / "mlflow"))


def mlflow_history(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((one.step, one.value) for one in client.get_metric_history(run_id, name))


def test_mlflow_writes_a_run_and_goes_on_with_it_after_a_resume(tmp_path: Path, mlflow_client: Any) -> None:
    cfg = logger_config(tmp_path / "logs", MLflow(experiment_name="sums", run_name="first"))
    many = {f"key_{number}": number for number in range(150)}
    with MetricsLogger(
        cfg, run_config={"dpo": {"seed": 42, "loss": {"beta": 0.1}}, **many, "long": "x" * 7000}
    ) as logger:
        logger.log(1, {"train/loss": 0.75, "validation-a/rewards/accuracies": 0.5})
        logger.log(2, {"train/loss": 0.5, "train/grad_norm": None})
    experiment = mlflow_client.get_experiment_by_name("sums")
    (run,) = mlflow_client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["dpo.loss.beta"] == "0.1" and len(run.data.params) == 153
    assert mlflow_history(mlflow_client, run.info.run_id, "train/loss") == [(1, 0.75), (2, 0.5)]
    assert mlflow_history(mlflow_client, run.info.run_id, "validation-a/rewards/accuracies") == [(1, 0.5)]
    assert "train/grad_norm" not in run.data.metrics

    logger = MetricsLogger(cfg, resumed_step=2, run_config={"dpo": {"seed": 42, "loss": {"beta": 0.1}}})
    logger.log(3, {"train/loss": 0.25})
    logger.close(exit_code=1)
    (again,) = mlflow_client.search_runs([experiment.experiment_id])
    assert again.info.run_id == run.info.run_id and again.info.status == "FAILED"
    assert mlflow_history(mlflow_client, run.info.run_id, "train/loss") == [(1, 0.75), (2, 0.5), (3, 0.25)]

    with MetricsLogger(cfg):  # from nothing: a run of its own
        pass
    assert len(mlflow_client.search_runs([experiment.experiment_id])) == 2


def test_mlflow_goes_on_with_a_run_that_is_named(tmp_path: Path, mlflow_client: Any) -> None:
    run = mlflow_client.create_run("0")
    with MetricsLogger(logger_config(tmp_path / "logs", MLflow(run_id=run.info.run_id))) as logger:
        logger.log(1, {"train/loss": 0.5})
    assert mlflow_history(mlflow_client, run.info.run_id, "train/loss") == [(1, 0.5)]


@pytest.mark.parametrize(
    "options", [{"tracking_uri": "http://127.0.0.1:9"}, {"run_id": "no such run"}], ids=["no server", "no run"]
)
def test_an_mlflow_that_does_not_start_is_refused(
    tmp_path: Path, mlflow_client: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError) as refusal:
        MetricsLogger(logger_config(tmp_path / "logs", MLflow(**options)))
    (problem,) = refusal.value.problems
    assert problem.where == "logger.mlflow.tracking_uri" and "logger.mlflow_enabled: false" in problem.fix


def test_mlflow_that_is_not_installed_is_refused_by_the_name_that_pip_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="pip install mlflow-skinny"):
        MetricsLogger(logger_config(tmp_path / "logs", MLflow()), enabled=False)
