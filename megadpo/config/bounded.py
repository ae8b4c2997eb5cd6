"""Limits the time and memory of a chat template or an interpolation. `{{ 'x' * 10**10 }}` asks for 10 GB, and two nested
loops may run for a day."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MOST_SECONDS = 10.0
"""Processor time. A template takes milliseconds."""
MOST_BYTES = 2**30
"""The most memory in addition to what the process has when the block begins."""


class OverLimit(Exception):
    """The block needed more time or memory than the limit. Its text says which."""


class _Stop(BaseException):
    """Raised inside the block in place of OverLimit, because libraries may catch every Exception there."""


@contextlib.contextmanager
def bounded(*, seconds: float | None = None, more_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Raises OverLimit from the block after `seconds` (None: MOST_SECONDS) of processor time, or when it asks for
    `more_bytes` more memory than the process has now. A block inside a block has the outer block's limits.

    The memory limit holds for the whole process while the block runs, and needs Linux. The time limit needs the main
    thread.
    """
    global _is_inside
    if _is_inside:
        yield
        return
    _is_inside = True
    try:
        with _time_limit(MOST_SECONDS if seconds is None else seconds), _memory_limit(more_bytes):
            yield
    except _Stop as error:
        raise OverLimit(str(error)) from None
    except MemoryError as error:
        raise OverLimit(f"it asks for more than {more_bytes / 2**20:.0f} MiB of memory") from error
    finally:
        _is_inside = False


_is_inside = False


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    if sys.platform == "win32" or not is_main:  # Python handles signals in the main thread only
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop(f"it takes more than {seconds:g} s of a processor")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # repeated, since some code swallows the first exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _memory_limit(more_bytes: int) -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split(maxsplit=1)[0])
    limit = pages * resource.getpagesize() + more_bytes
    known = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
