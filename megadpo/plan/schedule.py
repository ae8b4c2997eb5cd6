"""The order in which a pipeline stage runs micro-batches through its chunks, and what is alive on the way. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megadpo.config.grid import Grid


class ChunkBytes(Protocol):
    """What a micro-batch takes in one chunk (trace.ChunkTrace, activations.Activations)."""

    @property
    def saved(self) -> int: ...
    @property
    def forward_peak(self) -> int: ...
    @property
    def backward_peak(self) -> int: ...


@dataclass(frozen=True)
class Alive:
    """Of one stage in one step."""

    in_flight: int
    """Most passes through a chunk that are between their forward and their backward."""
    peak: int
    """Most bytes of activations."""


@dataclass(frozen=True)
class Slots:
    """Of each stage in one step. A slot is the forward and the backward of one micro-batch through one model chunk."""

    busy: int
    idle: int
    """The pipeline's bubble: slots in which a stage waits for the others."""

    @property
    def bubble(self) -> float:
        """Share (0..1) of idle slots."""
        return self.idle / (self.busy + self.idle)


def slots(grid: Grid, micro_batches: int) -> Slots:
    """1F1B, plain or interleaved: (stages - 1) idle ones (arXiv:2104.04473, section 2.2)."""
    return Slots(micro_batches * grid.virtual_pipeline, grid.pipeline - 1)


def alive(grid: Grid, stage: int, micro_batches: int, chunks: Sequence[ChunkBytes]) -> Alive:
    """Every micro-batch being as large as the one that `chunks` tell of."""
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
    """(forward?, chunk) in order: 1F1B, interleaved where a stage has several chunks, as megatron-core 0.16.1 has it
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
