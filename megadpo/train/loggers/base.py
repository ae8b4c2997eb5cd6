"""What a logger is. A new one is one file here, or one that the config names in `plugins`: `@LOGGERS.add(name)` on a
dataclass whose fields are its options, the keys of the section `logger.<name>`."""

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
    """One place that metrics go to. Both methods raise what the disk or the client raises."""

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Write the metrics of a step, by their full names; None: not known."""

    def close(self, exit_code: int) -> None:
        """Finish; exit_code: the run's."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger may ask about the run."""

    log_dir: Path
    resumed_step: int
    """The last step that the loaded checkpoint contains; 0 for a run that starts from nothing."""
    config: Mapping[str, Any] | None
    """The resolved config, for a table of runs."""


@dataclass(frozen=True, kw_only=True)
class Logger:
    """Base of the loggers that can be switched on."""

    key: ClassVar[str]
    """Its name in the config."""
    package: ClassVar[str]
    """The Python package of its client."""
    to_install: ClassVar[str] = ""
    """What pip calls it, where that is another name."""

    def open(self, run: LoggedRun) -> Sink:
        """Begin, or go on after `run.resumed_step`. Raises OSError, and ConfigError for settings that are refused."""
        raise NotImplementedError

    def problems(self, known: Known) -> Iterator[Problem]:
        """On the run's machine: a client that isn't installed. Imports none."""
        if known.machine is not None:
            yield from self.missing()

    def missing(self) -> Iterator[Problem]:
        """The client, where this Python hasn't got it."""
        if not _is_installed(self.package):
            expected = f"the Python package {self.package}, which is not installed"
            fix = f"`pip install {self.to_install or self.package}`, or logger.{self.key}_enabled: false"
            yield Problem(f"logger.{self.key}_enabled", True, expected, fix)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of that name in the working directory (wandb writes ./wandb by default) is found too, without an origin.
    return spec is not None and spec.origin is not None
