"""A block that would take for ever, or all memory, ends; one that takes little leaves nothing behind."""

from __future__ import annotations

import resource
import signal

import pytest

from megadpo.config.bounded import OverLimit, bounded


def spin() -> None:
    while True:
        pass


def test_time_and_memory_end_the_block():
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(OverLimit, match="more than 0.2 s"), bounded(seconds=0.2):
        spin()
    with pytest.raises(OverLimit, match="more than 64 MiB"), bounded(more_bytes=2**26):
        "x" * 2**34
    with bounded(), bounded():
        assert len("x" * 2**20) == 2**20
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
