"""The processes that write a checkpoint's files: no signal to stop ends them, and they end with their rank."""

from __future__ import annotations

import multiprocessing
import os
import queue
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megadpo.checkpoint.writer import write_files
from megadpo.parallel.lifetime import STOP_SIGNALS


class Calling:
    """In place of a bucket's data: calls a function in the process that writes it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        self.function()
        return iter(())


def write(folder, *functions: Callable[[], object]) -> Any:
    buckets = [(folder / f"{n}.distcp", f"{n}.distcp", (Calling(f), [])) for n, f in enumerate(functions)]
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    write_files([], 0, buckets, results)
    return results.get_nowait()


def nothing() -> None:
    pass


def stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.raise_signal(number)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise OSError(28, "No space left on device")


def test_writers_pass_over_the_signals_that_stop_their_rank(tmp_path):
    assert write(tmp_path, stop_signals, stop_signals) == {0: [], 1: []}


@pytest.mark.parametrize(("function", "words"), [(killed, "1.distcp ended: -9"), (full_disk, "No space left")])
def test_a_writer_that_fails_is_an_error(tmp_path, function, words):
    answer = write(tmp_path, nothing, function)
    assert isinstance(answer, Exception) and words in str(answer)


def test_writers_end_with_a_killed_rank(tmp_path):
    """The pipe has no more writer when neither the rank nor a process of its own is left."""
    ended, alive = os.pipe()
    started = tmp_path / "started"

    def sleep() -> None:
        started.touch()
        time.sleep(60)

    rank = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path, sleep))
    rank.start()
    os.close(alive)
    deadline = time.monotonic() + 20
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert started.exists()
    rank.kill()
    rank.join()
    readable, _, _ = select.select([ended], [], [], 10)
    os.close(ended)
    assert readable
