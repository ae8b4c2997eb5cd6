"""Which signals ask a rank to stop, and what happens to a process when the one that started it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM: torchrun, a preempted node. SIGUSR1: megadpo/launcher.py, Slurm. SIGINT: Ctrl-C."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def signal_when_parent_ends(number: signal.Signals, parent: int) -> None:
    """The kernel is to send this process `number` when its parent, whose process id was `parent`, ends, however it ends.

    Strictly, when the parent's thread that started this process ends. Linux only; elsewhere nothing happens. Raises
    OSError where the kernel refuses.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel was told
        os.kill(os.getpid(), number)
