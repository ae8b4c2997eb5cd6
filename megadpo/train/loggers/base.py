"""Base class of loggers. A new logger is one file here, or a file that the config names in `plugins`:
`@LOGGERS.add(name)` on a dataclass. Its fields are its options, which are the keys of the section `logger.<name>`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from megadpo.config.known import Known
from megadpo.config.problems import Problem

Number = int | float | None


class Sink(Protocol):
    """An open logger. Both methods raise the errors of the disk or the client. Those of metrics.jsonl end the run; of any
    other logger they are printed."""

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Writes the metrics of a step, with their full names. None: not known."""

    def close(self, exit_code: int) -> None:
        """Closes the logger. exit_code: the run's (docs/running.md); 1 after every error."""


@dataclass(frozen=True)
class LoggedRun:
    """Facts about the run, for loggers."""

    log_dir: Path
    resumed_step: int
    """The last step in the loaded checkpoint; 0 for a new run."""
    config: Mapping[str, Any] | None
    """The resolved config."""


@dataclass(frozen=True, kw_only=True)
class Logger:
    """Base of the loggers that the config can enable."""

    key: ClassVar[str]
    """Its name in the config."""
    package: ClassVar[str]
    """The Python package of its client."""
    to_install: ClassVar[str] = ""
    """The name that pip knows it by, if that differs."""

    def open(self, run: LoggedRun) -> Sink:
        """Starts a log, or continues it after `run.resumed_step`. Raises OSError, and ConfigError for refused settings."""
        raise NotImplementedError

    def problems(self, known: Known) -> Iterator[Problem]:
        """Reports a client that isn't installed on the run's machine. Imports no client."""
        if known.machine is not None:
            yield from self.missing()

    def missing(self) -> Iterator[Problem]:
        """Reports the client if it isn't installed."""
        if not _is_installed(self.package):
            expected = f"false, because the Python package {self.package} is not installed"
            fix = f"`pip install {self.to_install or self.package}`, or logger.{self.key}_enabled: false"
            yield Problem(f"logger.{self.key}_enabled", True, expected, fix)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of this name in the working directory (wandb writes ./wandb) is found too, but has no origin
    return spec is not None and spec.origin is not None
