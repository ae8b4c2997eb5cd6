"""How tensors get into files: megatron-core's format, by processes that a signal to stop doesn't end and that end with
their rank.

megatron-core 0.16.1 does this differently in two places, which `SaveStrategy.async_save` replaces:

- filesystem_async.py:52 `_get_write_results_queue` starts a multiprocessing Manager at the first save, for a queue. It
  stays in the rank's process group for the rest of the run: a signal to the group (torchrun's, Slurm's) ends it, and the
  save that was asked for then fails; a rank that is killed leaves it behind. Here the results stay in this process.
- filesystem_async.py:240 `write_preloaded_data_multiproc` waits for ever for a writer that was killed. Here that is an
  error, on every rank.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, _disable_gc
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megadpo.parallel.lifetime import STOP_SIGNALS, signal_when_parent_ends


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's `torch_dist` format, for `dist_checkpointing.save`."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> AsyncRequest:
        """What to write, and the function that writes it; `save` calls both. Collectives: megatron-core's planning."""
        # a new one each time: what a failed save left unread must not count as the next one's
        filesystem_async._results_queue = queue.SimpleQueue()
        request = super().async_save(sharded_state_dict, checkpoint_dir)
        if request.async_fn is None:  # this rank has nothing to write
            return request
        transforms, _ = (
            request.async_fn.args
        )  # the other: write through multistorageclient, which nothing here turns on
        return request._replace(async_fn=functools.partial(write_files, transforms))


@_disable_gc()  # in a forked process the garbage collector would free CUDA tensors that are the parent's
def write_files(transforms: list[Any], rank: int, buckets: list[Any], results: queue.SimpleQueue[Any]) -> None:
    """Write each of `buckets` (filesystem_async.WriteBucket: one file, its tensors on the CPU) from a process of its own.

    Puts one thing into `results`: {number of the bucket: list of WriteResult}, or the exception that a writer met.
    """
    context = multiprocessing.get_context("fork")  # tensors are not copied
    writers = []
    answers: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_write_file, args=(transforms, number, bucket, sender, os.getpid()))
        process.start()
        sender.close()  # else the pipe would stay open when the writer dies
        writers.append((process, receiver))
    for number, (process, receiver) in enumerate(writers):
        try:
            answers[number] = receiver.recv()
        except EOFError:
            process.join()
            answers[number] = RuntimeError(f"the process that wrote {buckets[number][0]} ended: {process.exitcode}")
        process.join()
        receiver.close()
    failed = [answer for answer in answers.values() if isinstance(answer, Exception)]
    results.put(failed[0] if failed else answers)


def _write_file(transforms: list[Any], number: int, bucket: Any, sender: Connection, rank_pid: int) -> None:
    """In a process of its own. Sends a list of WriteResult, or the exception that stopped it."""
    for stop in STOP_SIGNALS:  # they are for the rank, which waits for this file
        signal.signal(stop, signal.SIG_IGN)
    signal_when_parent_ends(signal.SIGKILL, rank_pid)
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(number)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, number, bucket, results, unfinished, use_fsync=True
    )
    sender.send(results.get()[1])
