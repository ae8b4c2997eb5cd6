"""A function over chunks in several processes: in order, lazily, and not for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megadpo.config.problems import ConfigError
from megadpo.data.tokens.workers import ordered_map, usable_cores
from tests.helpers.distributed import REPOSITORY


class Where:
    """(number, process) of each number; the first ones take longest. Ends its process at 99."""

    def __call__(self, number: int) -> tuple[int, int]:
        if number == 99:
            os._exit(3)
        if number == 77:
            raise ValueError("planted")
        time.sleep(0.05 if number < 4 else 0)
        return number, os.getpid()


def test_results_come_in_order_and_the_first_ones_from_here() -> None:
    made = list(ordered_map(Where(), iter(range(20)), num_workers=2, alone=3))
    assert [number for number, _ in made] == list(range(20))
    here = {number for number, process in made if process == os.getpid()}
    assert here == {0, 1, 2}
    assert len({process for _, process in made}) in (2, 3)


def test_few_chunks_and_one_worker_start_no_process() -> None:
    for options in ({"num_workers": 1, "alone": 0}, {"num_workers": 8, "alone": 5}):
        assert {process for _, process in ordered_map(Where(), iter(range(5)), **options)} == {os.getpid()}


def test_chunks_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def chunks() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    made = ordered_map(Where(), chunks(), num_workers=2, alone=0)
    next(made)
    assert len(taken) < 10
    made.close()  # type: ignore[attr-defined]


def test_an_exception_comes_back_and_a_dead_process_is_told() -> None:
    with pytest.raises(ValueError, match="planted"):
        list(ordered_map(Where(), iter([1, 77]), num_workers=2, alone=0))
    with pytest.raises(ConfigError, match=r"data.num_tokenize_workers: got 2; .*one of them died"):
        list(ordered_map(Where(), iter([1, 99]), num_workers=2, alone=0))


_KILLED = """
import os, signal, sys
from tests.data.tokens.test_workers import Where
from megadpo.data.tokens.workers import ordered_map
if __name__ == "__main__":
    for number, process in ordered_map(Where(), iter(range(100, 10**9)), num_workers=2, alone=0):
        print(process, flush=True)
        if number > 120:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True
    )
    workers = {int(line) for line in done.stdout.split()}
    assert done.returncode == -9 and workers
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(worker) for worker in workers):
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.05)


def test_usable_cores_are_those_of_the_process() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    with pytest.raises(ValueError, match="num_workers"):
        list(ordered_map(Where(), iter([1]), num_workers=0, alone=0))
