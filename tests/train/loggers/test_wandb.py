"""The real client of wandb, offline."""

from __future__ import annotations

import importlib
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import ConfigError
from megadpo.train.loggers.wandb import Wandb
from megadpo.train.metrics_logger import MetricsLogger
from tests.train.loggers.logs import logger_config


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


def test_a_server_of_wandb_that_does_not_answer_at_the_start_is_a_config_error(
    wandb_offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def init(**given: Any) -> None:
        raise wandb.errors.CommError("Run initialization has timed out after 90.0 sec.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"logger.wandb_enabled: false \(Run initialization has timed out"):
        MetricsLogger(logger_config(wandb_offline, Wandb(mode="online")))


def test_a_folder_named_wandb_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="pip install wandb"):
        MetricsLogger(logger_config(tmp_path / "logs", Wandb()), enabled=False)
