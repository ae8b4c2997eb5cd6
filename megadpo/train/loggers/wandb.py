"""Weights & Biases: <log_dir>/wandb/, and <log_dir>/wandb_run_id, the id that a resumed run uses again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.types import Text
from megadpo.config.variants import LOGGERS
from megadpo.train.loggers.base import LoggedRun, Logger, Number

RUN_ID_FILE = "wandb_run_id"


@LOGGERS.add("wandb")
@dataclass(frozen=True, kw_only=True)
class Wandb(Logger):
    """Also log to Weights & Biases, with the options in logger.wandb."""

    key = package = "wandb"
    project: Text | None = None
    """null: wandb's own default."""
    name: Text | None = None
    """The run's name. null: wandb chooses one."""
    entity: Text | None = None
    """User or team. null: the logged-in user's default."""
    mode: Literal["online", "offline"] | None = None
    """null: the value of the environment variable WANDB_MODE."""

    def open(self, run: LoggedRun) -> WandbRun:
        return WandbRun(self, run)


class WandbRun:
    """A Weights & Biases run. `logger.wandb.mode`, or else the variable WANDB_MODE, decides if it is online.

    A resumed run uses the same id. wandb keeps the first value logged for a step, so repeated steps change nothing. The
    client's own process sends the rows: it keeps them while the server can't be reached. After SIGKILL its last rows are
    missing, but not in metrics.jsonl.
    """

    def __init__(self, options: Wandb, run: LoggedRun) -> None:
        import wandb

        id_file = run.log_dir / RUN_ID_FILE
        known_id = id_file.read_text().strip() if run.resumed_step and id_file.exists() else None
        given = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
        try:
            self._run = wandb.init(
                id=known_id or None,
                resume="allow",
                dir=str(run.log_dir),
                config=None if run.config is None else dict(run.config),
                **given,
            )
        except wandb.errors.Error as error:  # no API key, an invalid name, a server that can't be reached
            raise ConfigError(
                Problem(
                    "logger.wandb",
                    given,
                    "settings with which wandb starts",
                    f"`wandb login`, or logger.wandb.mode: offline, or logger.wandb_enabled: false ({error})",
                )
            ) from error
        id_file.write_text(self._run.id + "\n")

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)
