"""MLflow: a tracking server, or a folder; and <log_dir>/mlflow_run_id, the id that a resumed run uses again."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.config.types import Text
from megadpo.config.variants import LOGGERS
from megadpo.train.loggers.base import LoggedRun, Logger, Number

RUN_ID_FILE = "mlflow_run_id"
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 6000
"""MLflow's limits: metrics in one request, parameters or tags in one, and characters of a parameter's value."""
_MOST_UNSENT = 200_000
"""Values, some 5,000 steps (100 MB). If an outage is longer, the oldest are lost."""
_WAIT_TIMES = 10
"""After a request that failed, this many times as long as it took passes before the next one."""


@LOGGERS.add("mlflow")
@dataclass(frozen=True, kw_only=True)
class MLflow(Logger):
    """Also log to MLflow, with the options in logger.mlflow."""

    key = "mlflow"
    package = "mlflow"
    to_install = "mlflow-skinny"
    experiment_name: Text | None = None
    """null: Default."""
    run_name: Text | None = None
    """null: MLflow chooses one."""
    run_id: Text | None = None
    """Continue this run of the tracking server. null: a new run; a resumed run continues the one stored in log_dir."""
    tracking_uri: Text | None = None
    """A server's address, or a folder. null: the environment's MLFLOW_TRACKING_URI, else mlflow in logger.log_dir."""
    artifact_location: Text | None = None
    """For a new experiment. null: the server's default."""

    def open(self, run: LoggedRun) -> MLflowRun:
        return MLflowRun(self, run)


class MLflowRun:
    """An MLflow run. A resumed run uses the same id. Repeated steps are logged twice; MLflow's charts show the later value.

    Metrics that could not be sent are sent with those of a later step. Every rank waits while a request is tried, so it is
    tried once, and rarely: an outage costs a tenth of its time at most.
    """

    def __init__(self, options: MLflow, run: LoggedRun) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        address = options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or str(run.log_dir / "mlflow")
        if "://" not in address or address.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.7 and later ask for this
        self._unsent: deque[Any] = deque(maxlen=_MOST_UNSENT)
        self._send_at_s = 0.0
        id_file = run.log_dir / RUN_ID_FILE
        known_id = id_file.read_text().strip() if run.resumed_step and id_file.exists() else None
        try:
            with _unless_set(MLFLOW_HTTP_REQUEST_MAX_RETRIES="2"):  # seven, over minutes, for a server that isn't there
                self._client = MlflowClient(tracking_uri=address)
                self._id = self._begin(options, options.run_id or known_id)
                self._log_config(dict(_flat(run.config or {})), run.resumed_step)
        except MlflowException as error:
            fix = f"correct logger.mlflow, or logger.mlflow_enabled: false ({first_line(error)})"
            raise ConfigError(
                Problem("logger.mlflow.tracking_uri", address, "an address or folder at which MLflow starts", fix)
            ) from error
        id_file.write_text(self._id + "\n")

    def _begin(self, options: MLflow, known_id: str | None) -> str:
        """Starts the run and returns its id."""
        if known_id is not None:
            self._client.update_run(known_id, status="RUNNING")
            return known_id
        name = options.experiment_name or "Default"
        found = self._client.get_experiment_by_name(name)
        if found is None:
            experiment = self._client.create_experiment(name, artifact_location=options.artifact_location)
        else:
            experiment = found.experiment_id
        started: str = self._client.create_run(experiment, run_name=options.run_name).info.run_id
        return started

    def _log_config(self, config: Mapping[str, str], resumed_step: int) -> None:
        """New keys become parameters. MLflow never changes a parameter, so what a resumed run changes becomes a tag."""
        from mlflow.entities import Param, RunTag

        logged = _logged_config(self._client.get_run(self._id).data)
        for some in _portions(name for name in sorted(config) if name not in logged):
            self._client.log_batch(self._id, params=[Param(name, config[name]) for name in some])
        for some in _portions(name for name in sorted(config) if logged.get(name, config[name]) != config[name]):
            tags = [RunTag(f"resumed_{resumed_step}.{name}", config[name]) for name in some]
            self._client.log_batch(self._id, tags=tags)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._unsent += [Metric(name, value, now_ms, step) for name, value in metrics.items() if value is not None]
        if time.monotonic() >= self._send_at_s:
            self._send()

    def _send(self) -> None:
        started_s = time.monotonic()
        try:
            with _one_short_try():
                while some := list(islice(self._unsent, _MOST_METRICS)):
                    self._client.log_batch(self._id, metrics=some)
                    for _ in some:
                        self._unsent.popleft()
        except Exception:
            now_s = time.monotonic()
            self._send_at_s = now_s + _WAIT_TIMES * (now_s - started_s)
            raise

    def close(self, exit_code: int) -> None:
        try:
            self._send()
        finally:
            with _one_short_try():
                self._client.set_terminated(self._id, {0: "FINISHED", 1: "FAILED"}.get(exit_code, "KILLED"))


def _one_short_try() -> contextlib.AbstractContextManager[None]:
    return _unless_set(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT="10")


@contextlib.contextmanager
def _unless_set(**variables: str) -> Iterator[None]:
    """These environment variables, except where the user has set them. MLflow reads them at each request."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values, as text."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:_LONGEST_PARAM]


def _logged_config(data: Any) -> dict[str, str]:
    """The config as an MLflow run has it: its parameters, changed by the tags of one resume after the other."""
    resumes = [found for tag in data.tags if (found := re.fullmatch(r"resumed_(\d+)\.(.+)", tag))]
    resumes.sort(key=lambda found: int(found[1]))
    return {**data.params, **{found[2]: data.tags[found[0]] for found in resumes}}


def _portions(names: Iterator[str]) -> Iterator[list[str]]:
    while some := list(islice(names, _MOST_PARAMS)):
        yield some
