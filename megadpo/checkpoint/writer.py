"""Writes tensors in megatron-core's format, in threads of the rank.

Threads end with their rank and receive no signals. megatron-core 0.16.1 (filesystem_async.py) uses processes and a
multiprocessing Manager instead. A signal to the process group ends these, and the save with them; a killed rank leaves
them running; and a forked process copies each page of memory that the next step changes.
"""

from __future__ import annotations

import io
import queue
import threading
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megadpo.files.atomic import sync

try:
    from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    WRITES_COMMON = True
    """Whether megatron-core has a strategy of its own for common.pt. 0.19 hands its content to `async_save` instead."""
except ImportError:
    TorchCommonSaveStrategy = object
    WRITES_COMMON = False

_BACKEND, _VERSION = "torch_dist", 1
Bucket = Any
"""filesystem_async.WriteBucket: (path, name, (objects, tensors)), a file and what is written into it."""


class HostCopies:
    """Host memory for copies of a rank's tensors. It is kept for the next save, because getting new memory takes as long as
    the copy."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    @torch.no_grad()
    def of(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of tensors of any device, valid until the next call. Waits for the GPU."""
        copies = [self._buffer(number, tensor) for number, tensor in enumerate(tensors)]
        del self._buffers[len(tensors) :]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.synchronize()
        return copies

    def _buffer(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        known = self._buffers[number] if number < len(self._buffers) else None
        if known is not None and (known.shape, known.dtype) == (tensor.shape, tensor.dtype):
            return known
        made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._buffers[number : number + 1] = [made]
        return made


class RankFiles:
    """The tensor files of one rank, with the tensors' values at the call of `SaveStrategy`."""

    def __init__(self, writer: FileSystemWriterAsync, metadata: Metadata | None, buckets: list[Bucket]) -> None:
        """metadata: of all ranks, on rank 0."""
        self._writer = writer
        self._metadata = metadata
        self._buckets = buckets
        self.bytes = sum(tensor.nbytes for _, _, (_, tensors) in buckets for _, tensor in tensors)

    def write(self) -> list[WriteResult]:
        """Write each file in a thread. When this returns all are on the disk, and the tensors' memory may be reused. Returns
        what was written where. Raises a writer's error. No collectives."""
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        answers: list[list[WriteResult] | Exception] = [RuntimeError("its thread ended") for _ in self._buckets]

        def write(number: int) -> None:
            answers[number] = _write_file(transforms, self._buckets[number])

        threads = [threading.Thread(target=write, args=(number,), daemon=True) for number in range(len(self._buckets))]
        had_crc32 = get_crc32_options()
        set_crc32_options(False)  # it holds Python's lock, which the next steps need; the manifest has checksums anyway
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        set_crc32_options(had_crc32)
        self._buckets = []
        written: list[WriteResult] = []
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            written += answer
        return written

    def write_metadata(self, written: list[list[WriteResult]]) -> None:
        """On rank 0: write .metadata and metadata.json. written: what `write` returned on each rank. Raises OSError."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, written)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self._writer.path))


class SaveStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's `torch_dist` format, for `dist_checkpointing.save` with async_sharded_save. It only plans: the caller
    then writes `files` and `common`.

    copies: memory that the tensors are copied to, so that training can continue while they are written. None: host tensors
    are written without a copy.
    """

    def __init__(self, copies: HostCopies | None = None) -> None:
        super().__init__(_BACKEND, _VERSION)
        self._copies = copies
        self.files: RankFiles
        self.common = CommonState(*(("torch", 1) if WRITES_COMMON else ()))
        if WRITES_COMMON:
            register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, self.common)  # `save` takes no other way

    def async_save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *_: Any) -> AsyncRequest:
        """Collectives: megatron-core's planning. Waits for the GPU."""
        further = {}
        if not WRITES_COMMON:
            self.common.save_common(sharded_state_dict.pop("common_state").data, checkpoint_dir)
            further = {"async_strategy": "mcore"}  # without nvidia-resiliency-ext
        filesystem_async._results_queue = queue.SimpleQueue()  # not used; without one megatron-core starts a Manager
        if self._copies is not None:
            parts = [part for part in nested_values(sharded_state_dict) if isinstance(part, ShardedTensor)]
            written = [part for part in parts if part.data is not None and is_main_replica(part.replica_id)]
            for part, copy in zip(written, self._copies.of([part.data for part in written]), strict=True):
                part.data = copy
        return super().async_save(sharded_state_dict, checkpoint_dir, **further)

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: tuple[Any, Metadata | None, Any], *_: Any
    ) -> AsyncRequest:
        self.files = RankFiles(writer, planned[1], writer.preload_tensors(writer.write_buckets or []))
        writer.write_buckets = None
        return AsyncRequest(None, (), [])


class CommonState(TorchCommonSaveStrategy):
    """Keeps the content of common.pt, which megatron-core would write at once. Rank 0's is written."""

    content = b""

    def save_common(self, common_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        buffer = io.BytesIO()
        torch.save(common_state_dict, buffer)
        self.content = buffer.getvalue()


def _write_file(transforms: list[Any], bucket: Bucket) -> list[WriteResult] | Exception:
    """What was written, or the error."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    unfinished: queue.Queue[int] = queue.Queue()
    unfinished.put(0)
    try:
        FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, results, unfinished, use_fsync=False)
        answer: list[WriteResult] | Exception = results.get_nowait()[1]
        if not isinstance(answer, Exception):
            sync(Path(bucket[0]))  # after it is closed: with `use_fsync` the end would stay in Python's buffer
    except Exception as error:  # for the rank's main thread
        return error
    return answer
