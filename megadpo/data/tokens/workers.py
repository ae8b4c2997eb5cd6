"""A function over chunks of data, in several processes, with the results in order."""

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
"""Chunks in the works for each process: none has to wait, and memory stays small."""

_function: Callable[[Any], Any] | None = None  # of a worker process, which has one for all its life


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Given], Made], chunks: Iterator[Given], *, num_workers: int, alone: int
) -> Iterator[Made]:
    """function(chunk) for each chunk, in order. The first `alone` chunks, and all with num_workers 1, in this process;
    the others in `num_workers` processes, started only if there are others.

    `function` is pickled once a process. Exceptions of `function` and `chunks` are raised where their result would have
    come. Raises ConfigError if a process dies.
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
    # Not forked from this process, which may hold CUDA and threads, but from a clean one that has done the imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "transformers", type(function).__module__])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_become, initargs=(function,))
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
                expected="processes that live until the data is tokenised; one of them died (killed for memory?)",
                fix="set it lower, or give the machine more memory",
            )
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _become(function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for work for ever otherwise, if what started it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(chunk: Any) -> Any:
    assert _function is not None, "the pool's initializer sets it"
    return _function(chunk)
