"""A limit of time and memory around what a template or an expression computes: `{{ 'x' * 10**10 }}` asks for 10 GB, and
two nested loops run for a day."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

MOST_SECONDS = 10.0
"""Of a processor. A template takes milliseconds."""
MOST_BYTES = 2**30
"""More than the process has when the block begins."""


class OverLimit(Exception):
    """The block took more time or memory than it may. Its text says which."""


class _Stop(BaseException):
    """OverLimit on its way out of the block: libraries catch every Exception of what they call."""


@contextlib.contextmanager
def bounded(*, seconds: float | None = None, more_bytes: int = MOST_BYTES) -> Iterator[None]:
    """Raises OverLimit from the block when it has used `seconds` (None: MOST_SECONDS) of processor time, or asks for
    `more_bytes` more memory than the process has now. Blocks inside a block count with it.

    The memory's limit holds for the whole process while the block runs, and needs Linux; the time's needs the main thread.
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
    if sys.platform == "win32" or not is_main:  # Python gives signals to no other thread
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Stop(f"it takes more than {seconds:g} s of a processor")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1.0)  # again each second, if it came where exceptions are lost
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
