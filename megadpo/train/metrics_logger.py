"""Sends a run's metrics to metrics.jsonl and to every logger that the config enables."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.config.schema import LoggerConfig
from megadpo.train.loggers.base import LoggedRun, Number, Sink
from megadpo.train.loggers.jsonl import METRICS_FILE, JsonLines

LOG = logging.getLogger(__name__)


class MetricsLogger:
    """Sends the metrics of a step to metrics.jsonl and to the loggers of the config. Only one rank writes.

    cfg: the config's `logger` section.
    enabled: whether this rank writes. On the others `log` and `close` do nothing.
    resumed_step: the last step in the loaded checkpoint; 0 for a new run. Lines that an earlier process logged after this
        step are moved from metrics.jsonl to a second file, so that each step has one line.
    run_config: the resolved config, for wandb.

    Raises ConfigError on EVERY rank, before anything is written, if an enabled client is not installed; on the writing
    rank also if log_dir can't be written or wandb refuses to start. `log` raises OSError if metrics.jsonl can't be written,
    because a run without its metrics should end. No other logger ends a run that has started.
    """

    def __init__(
        self,
        cfg: LoggerConfig,
        *,
        enabled: bool = True,
        resumed_step: int = 0,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        if problems := [problem for logger in cfg.enabled for problem in logger.missing()]:
            raise ConfigError(problems)
        self.notes: list[str] = []
        """A line where the folder held the steps of an earlier run."""
        self.exit_code = 0
        """The run's, if the `with` block ends without an error: 75 or 143 after a stop. The loggers are closed with it."""
        self._sinks: list[Sink] = []
        self._last_step = resumed_step
        if not enabled:
            return
        try:
            self._open_sinks(cfg, resumed_step, run_config)
        except OSError as error:
            self.close(exit_code=1)
            raise ConfigError(
                Problem("logger.log_dir", cfg.log_dir, "a folder that can be written", f"choose another ({error})")
            ) from error
        except ConfigError:
            self.close(exit_code=1)
            raise

    def _open_sinks(self, cfg: LoggerConfig, resumed_step: int, run_config: Mapping[str, Any] | None) -> None:
        run = LoggedRun(Path(cfg.log_dir), resumed_step, run_config)
        run.log_dir.mkdir(parents=True, exist_ok=True)
        lines = JsonLines(run.log_dir / METRICS_FILE, resumed_step=resumed_step)
        self._sinks.append(lines)
        if lines.superseded is not None:
            whose = f"later than step {resumed_step}, which are done again" if resumed_step else "of another run"
            self.notes.append(f"logger.log_dir held steps {whose}: they are in {lines.superseded} now")
        for logger in cfg.enabled:
            self._sinks.append(_NeverFatal(logger.key, logger.open(run)))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, by their full names. Values are Python or numpy numbers, 0-d tensors or None.

        A step has one line, so its validation metrics must be in the same call. Raises ValueError if steps go backwards,
        TypeError for a value that isn't a number, OSError if metrics.jsonl can't be written.
        """
        if not self._sinks:
            return
        if step < self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}: metrics are logged in order")
        self._last_step = step
        numbers = {name: plain_number(name, value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.log(step, numbers)

    def close(self, exit_code: int = 0) -> None:
        """Closes all loggers. For wandb a run with an exit code other than 0 has failed. A second call does nothing. Raises
        OSError if metrics.jsonl can't be closed."""
        sinks, self._sinks = self._sinks, []
        errors: list[Exception] = []
        for sink in sinks:
            try:
                sink.close(exit_code)
            except Exception as error:  # the other sinks must be closed too; the first error is raised below
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close(self.exit_code if error is None else 1)
        except Exception as closing_error:
            if error is None:
                raise
            # Show the error that ended the run; an error while closing often has the same cause (a full disk)
            LOG.warning("closing the metric files failed too: %s", closing_error)


class _NeverFatal:
    """A logger whose errors don't end the run. The first one in `log` is printed, and one in `close`."""

    def __init__(self, key: str, sink: Sink) -> None:
        self._key, self._sink = key, sink
        self._has_failed = False

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        try:
            self._sink.log(step, metrics)
        except Exception as error:
            if not self._has_failed:
                what = f"logger.{self._key} could not log step {step} ({first_line(error)})"
                LOG.warning("%s. The run goes on; metrics.jsonl has every step. Later errors are not printed.", what)
            self._has_failed = True

    def close(self, exit_code: int) -> None:
        try:
            self._sink.close(exit_code)
        except Exception as error:
            what = f"logger.{self._key} could not be closed ({first_line(error)})"
            LOG.warning("%s. It may lack steps; metrics.jsonl has every step.", what)


def plain_number(name: str, value: Any) -> Number:
    """A Python int or float (or None) from any scalar; raises TypeError for anything else."""
    if hasattr(value, "item"):  # numpy scalars, 0-d arrays and tensors, without importing either library
        value = value.item()
    if isinstance(value, bool) or (value is not None and not isinstance(value, int | float)):
        raise TypeError(f"metric {name}: expected a number; got {value!r}")
    return value
