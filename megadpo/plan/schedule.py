"""The order in which a pipeline stage runs micro-batches through its chunks, and the memory at each point. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megadpo.config.grid import Grid


class ChunkBytes(Protocol):
    """Bytes of a micro-batch in one chunk (trace.ChunkTrace, activations.Activations)."""

    @property
    def saved(self) -> int: ...
    @property
    def forward_peak(self) -> int: ...
    @property
    def backward_peak(self) -> int: ...


@dataclass(frozen=True)
class Alive:
    """The largest numbers of one stage in one step."""

    in_flight: int
    """Passes through a chunk between their forward and backward."""
    peak: int
    """Bytes of activations."""


@dataclass(frozen=True)
class Slots:
    """Slots of each stage in one step. A slot is the forward and backward of one micro-batch through one model chunk."""

    busy: int
    idle: int
    """The pipeline's bubble: slots in which a stage waits for other stages."""

    @property
    def bubble(self) -> float:
        """Share (0..1) of idle slots."""
        return self.idle / (self.busy + self.idle)


def slots(grid: Grid, micro_batches: int) -> Slots:
    """1F1B, plain or interleaved, has (stages - 1) idle slots (arXiv:2104.04473, section 2.2)."""
    return Slots(micro_batches * grid.virtual_pipeline, grid.pipeline - 1)


def alive(grid: Grid, stage: int, micro_batches: int, chunks: Sequence[ChunkBytes]) -> Alive:
    """For micro-batches that all have the sizes in `chunks`."""
    now = count = most = peak = 0
    for forward, chunk in passes(grid, stage, micro_batches):
        sizes = chunks[chunk]
        if forward:
            peak = max(peak, now + sizes.forward_peak)
            now, count = now + sizes.saved, count + 1
        else:
            now, count = now - sizes.saved, count - 1
            peak = max(peak, now + sizes.backward_peak)
        most = max(most, count)
    return Alive(most, peak)


def passes(grid: Grid, stage: int, micro_batches: int) -> Iterator[tuple[bool, int]]:
    """(forward?, chunk) in order: 1F1B, interleaved if a stage has several chunks, as in megatron-core 0.16.1
    (pipeline_parallel/schedules.py, `get_pp_rank_microbatches` and `get_schedule_table`)."""
    chunks, stages = grid.virtual_pipeline, grid.pipeline
    order = [
        chunk
        for first in range(0, micro_batches, stages if chunks > 1 else 1)
        for chunk in range(chunks)
        for _ in range(min(stages if chunks > 1 else 1, micro_batches - first))
    ]
    ahead = stages - stage - 1
    if chunks > 1:
        ahead = 2 * ahead + (chunks - 1) * stages
    ahead = min(ahead, len(order))
    yield from ((True, chunk) for chunk in order[:ahead])
    for forward, backward in zip(order[ahead:], order, strict=False):
        yield True, forward
        yield False, chunks - 1 - backward
    for backward in order[len(order) - ahead :]:
        yield False, chunks - 1 - backward
