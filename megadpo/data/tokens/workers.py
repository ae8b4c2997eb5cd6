"""Maps a function over chunks of data in several processes; results come in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from megadpo.config.problems import ConfigError, Problem

Given = TypeVar("Given")
Made = TypeVar("Made")

_AHEAD = 3
"""Chunks submitted for each process. Enough that none waits; few enough that memory stays small."""

_function: Callable[[Any], Any] | None = None  # set once in each worker process


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Given], Made], chunks: Iterator[Given], *, num_workers: int, alone: int
) -> Iterator[Made]:
    """function(chunk) for each chunk, in order. This process computes the first `alone` chunks, or all if num_workers is
    1. `num_workers` other processes compute the rest; they are started only if there is a rest.

    `function` is pickled once for each process. Exceptions of `function` and `chunks` are raised in place of their
    result. Raises ConfigError if a process dies.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    yield from map(function, islice(chunks, alone))
    if num_workers == 1:
        yield from map(function, chunks)
        return
    for chunk in chunks:
        yield from _in_processes(function, chain([chunk], chunks), num_workers)


def _in_processes(function: Callable[[Given], Made], chunks: Iterator[Given], num_workers: int) -> Iterator[Made]:
    # Forked from a clean process that has done the imports, because this one may have CUDA and threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "transformers", type(function).__module__])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(function,))
    try:
        pending: deque[Future[Made]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_call, chunk))
            if len(pending) >= _AHEAD * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            Problem(
                where="data.num_tokenize_workers",
                value=num_workers,
                expected="processes that live until the data is tokenised; one of them died (out of memory?)",
                fix="set it lower, or give the machine more memory",
            )
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core already has a process
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker if the process that started it is killed. Otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(chunk: Any) -> Any:
    assert _function is not None, "the pool's initializer sets it"
    return _function(chunk)
