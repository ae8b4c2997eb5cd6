"""The signals that ask a rank to stop, and the end of a rank whose launcher has ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from megadpo.launcher import under_torchrun

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SIGTERM: torchrun, a preempted node. SIGUSR1: megadpo/launcher.py, Slurm. SIGINT: Ctrl-C."""

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_launcher() -> None:
    """Ask the kernel to send this rank SIGTERM when its launcher (torchrun or megadpo/launcher.py) ends, even if that was
    killed. Otherwise the ranks would go on without it.

    The kernel watches the thread that started this process. Linux only; elsewhere nothing happens. Raises OSError where
    the kernel refuses.
    """
    parent = os.getppid()
    if not under_torchrun() or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGTERM)
