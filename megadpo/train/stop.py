"""Stops a run between two steps: after a signal, or at the time by which a checkpoint must be saved."""

from __future__ import annotations

import signal
import time
from types import FrameType

from megadpo.launcher import ignore_at_exit
from megadpo.parallel import ParallelContext
from megadpo.parallel.lifetime import STOP_SIGNALS

EXIT_INTERRUPTED = 143
"""Exit code after a stop signal: the run is not finished. Started again, it goes on from its newest checkpoint, if it has one."""
EXIT_OUT_OF_TIME = 75
"""Exit code after checkpointing.checkpoint_must_save_by (EX_TEMPFAIL), likewise."""

SAME_SIGNAL_S = 10.0
"""Signals within this time are one request to stop: Slurm signals every process of a job, and torchrun also signals its
workers."""


class StopWatcher:
    """Collects reasons to stop on each rank. `agreed` gives all ranks the same answer."""

    def __init__(self, parallel: ParallelContext, deadline_s: float | None) -> None:
        """deadline_s: the value of time.monotonic() from which on there is a reason; None: no time limit."""
        self._parallel = parallel
        self._deadline_s = deadline_s
        self._signalled_at_s: float | None = None

    def install(self) -> None:
        """Catches STOP_SIGNALS: the current step is finished and saved.

        Ctrl-C more than SAME_SIGNAL_S after the first signal ends the process at once. Other later signals, such as
        Slurm's SIGTERM at the time limit, are ignored, so that the save can finish. A signal that was blocked until now
        (megadpo/launcher.py) is received here.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        ignore_at_exit(STOP_SIGNALS)

    def agreed(self) -> int | None:
        """The exit code if the run must stop, else None; the same on every rank. Collectives: `ParallelContext.largest`, so
        that an update that is queued on the GPU goes on meanwhile."""
        late = self._deadline_s is not None and time.monotonic() >= self._deadline_s
        reason = 2 if self._signalled_at_s is not None else 1 if late else 0
        return {0: None, 1: EXIT_OUT_OF_TIME, 2: EXIT_INTERRUPTED}[self._parallel.largest(reason)]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._signalled_at_s is None:
            self._signalled_at_s = now_s
        elif number == signal.SIGINT and now_s - self._signalled_at_s > SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
