"""The real client of MLflow, with a folder as its server."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import ConfigError
from megadpo.train.loggers.mlflow import MLflow
from megadpo.train.metrics_logger import MetricsLogger
from tests.train.loggers.logs import logger_config


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


def test_what_a_resumed_run_changes_is_a_tag(tmp_path: Path, mlflow_client: Any) -> None:
    cfg = logger_config(tmp_path / "logs", MLflow())

    def run(resumed_step: int, **config: Any) -> Any:
        with MetricsLogger(cfg, resumed_step=resumed_step, run_config=config):
            pass
        (found,) = mlflow_client.search_runs(["0"])
        return found.data.params, {key: value for key, value in found.data.tags.items() if "resumed" in key}

    many = {f"key_{number}": 0 for number in range(150)}
    params, tags = run(0, dpo={"seed": 42, "steps": 100}, **many)
    assert tags == {}
    more, tags = run(100, dpo={"seed": 42, "steps": 200}, new="x" * 7000, **many)
    assert more == params | {"new": "x" * 6000} and tags == {"resumed_100.dpo.steps": "200"}
    same, tags = run(1000, dpo={"seed": 42, "steps": 200}, new="x" * 7000, **many)
    assert same == more and tags == {"resumed_100.dpo.steps": "200"}
    _, tags = run(1100, dpo={"seed": 42, "steps": 100}, **dict.fromkeys(many, 1))
    assert len(tags) == 152 and tags["resumed_1100.dpo.steps"] == "100" and tags["resumed_1100.key_149"] == "1"


@pytest.mark.parametrize(("exit_code", "status"), [(75, "KILLED"), (143, "KILLED"), (1, "FAILED")])
def test_how_a_run_ended(tmp_path: Path, mlflow_client: Any, exit_code: int, status: str) -> None:
    with MetricsLogger(logger_config(tmp_path / "logs", MLflow())) as logger:
        logger.exit_code = exit_code
    (run,) = mlflow_client.search_runs(["0"])
    assert run.info.status == status


def test_mlflow_goes_on_with_a_run_that_is_named(tmp_path: Path, mlflow_client: Any) -> None:
    run = mlflow_client.create_run("0")
    with MetricsLogger(logger_config(tmp_path / "logs", MLflow(run_id=run.info.run_id))) as logger:
        logger.log(1, {"train/loss": 0.5})
    assert mlflow_history(mlflow_client, run.info.run_id, "train/loss") == [(1, 0.5)]


def test_what_mlflow_missed_in_an_outage_is_sent_later(
    tmp_path: Path, mlflow_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server, away = tmp_path / "logs" / "mlflow", tmp_path / "away"
    with MetricsLogger(logger_config(tmp_path / "logs", MLflow())) as logger:
        for step in range(1, 6):
            if step == 2:
                server.rename(away)
            if step == 4:
                away.rename(server)
            logger.log(step, {"train/loss": step / 8, "train/grad_norm": float("nan")})
    (run,) = mlflow_client.search_runs(["0"])
    expected = [(step, step / 8) for step in range(1, 6)]
    assert mlflow_history(mlflow_client, run.info.run_id, "train/loss") == expected
    assert run.info.status == "FINISHED"
    (words,) = caplog.messages
    assert words.startswith("logger.mlflow could not log step 2 (")


def test_an_mlflow_that_is_away_at_the_end_fails_no_run(
    tmp_path: Path, mlflow_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsLogger(logger_config(tmp_path / "logs", MLflow())) as logger:
        logger.log(1, {"train/loss": 0.5})
        (tmp_path / "logs" / "mlflow").rename(tmp_path / "away")
    (words,) = caplog.messages
    assert words.startswith("logger.mlflow could not be closed (")


def test_an_outage_of_mlflow_holds_up_the_run_a_little(
    tmp_path: Path, mlflow_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    retries = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    requests = []

    def log_batch(self: Any, run_id: str, **given: Any) -> None:
        requests.append(os.environ[retries])
        time.sleep(0.1)
        raise ConnectionError

    monkeypatch.delenv(retries, raising=False)
    with MetricsLogger(logger_config(tmp_path / "logs", MLflow())) as logger:
        monkeypatch.setattr(type(mlflow_client), "log_batch", log_batch)
        for step in range(1, 20):
            logger.log(step, {"train/loss": 0.5})
    assert requests == ["0", "0"], "for the first step and at the end"
    assert retries not in os.environ


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
