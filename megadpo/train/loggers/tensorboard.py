"""TensorBoard's event files: <log_dir>/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megadpo.config.types import PathText
from megadpo.config.variants import LOGGERS
from megadpo.train.loggers.base import LoggedRun, Logger, Number


@LOGGERS.add("tensorboard")
@dataclass(frozen=True, kw_only=True)
class TensorBoard(Logger):
    """Also write TensorBoard's event files."""

    key = package = "tensorboard"
    log_dir: PathText | None = None
    """Folder of the event files, relative to logger.log_dir. null: tensorboard."""

    def open(self, run: LoggedRun) -> EventFiles:
        return EventFiles(str(run.log_dir / (self.log_dir or "tensorboard")), resumed_step=run.resumed_step)


class EventFiles:
    """Event files. In a resumed run, `purge_step` makes TensorBoard hide later steps of an earlier process."""

    def __init__(self, folder: str, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # 0: a new run hides an older run in the same folder
        purge_step = resumed_step + 1 if resumed_step else 0
        self._writer = SummaryWriter(log_dir=folder, purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(name, value, global_step=step)
        self._writer.flush()  # waits for the writing thread, and raises its error

    def close(self, exit_code: int) -> None:
        self._writer.close()
