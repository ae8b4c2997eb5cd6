"""Reasons to stop between two steps: a signal, or a time by which the checkpoint must be written."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megadpo.parallel import ParallelContext
from megadpo.parallel.lifetime import STOP_SIGNALS

EXIT_INTERRUPTED = 143
"""Exit code after SIGTERM or SIGINT: a checkpoint was written, the run is not done."""
EXIT_OUT_OF_TIME = 75
"""Exit code after checkpointing.checkpoint_must_save_by: start the run again to go on (EX_TEMPFAIL)."""

SAME_SIGNAL_S = 10.0
"""One request to stop may come several times: Slurm signals every process of a job, and torchrun, told so itself, then
signals its workers."""


class StopWatcher:
    """Collects reasons on each rank; `agreed` makes all ranks see the same."""

    def __init__(self, parallel: ParallelContext, must_save_by_s: float | None) -> None:
        self._parallel = parallel
        self._deadline = None if must_save_by_s is None else time.monotonic() + must_save_by_s
        self._signalled_at_s: float | None = None

    def install(self) -> None:
        """Catch STOP_SIGNALS: the step in progress is finished and saved.

        Ctrl-C more than SAME_SIGNAL_S after the first signal ends the process at once: somebody does not want to wait.
        Another later signal, such as Slurm's SIGTERM at the time limit, changes nothing: the save goes on. One that came
        before, and waited (megadpo/launcher.py), is received now.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def agreed(self) -> int | None:
        """The exit code to stop with, the same on every rank, or None. One all-reduce of one number over the world."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        reason = 2 if self._signalled_at_s is not None else 1 if late else 0
        shared = torch.tensor([reason], dtype=torch.int32, device=self._parallel.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return {0: None, 1: EXIT_OUT_OF_TIME, 2: EXIT_INTERRUPTED}[int(shared.item())]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._signalled_at_s is None:
            self._signalled_at_s = now_s
        elif number == signal.SIGINT and now_s - self._signalled_at_s > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
