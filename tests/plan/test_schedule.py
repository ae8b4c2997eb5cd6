"""The order of passes against megatron-core's own tables, and what is alive on the way."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.grid import Grid
from megadpo.plan.schedule import alive, passes, slots


@dataclass(frozen=True)
class Bytes:
    saved: int
    forward_peak: int
    backward_peak: int


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_pass_goes_forward_once_and_back_once_after_that(stages, chunks, rounds):
    grid = Grid(pipeline=stages, virtual_pipeline=chunks if stages > 1 else 1)
    micro_batches = rounds * stages
    for stage in range(stages):
        there = [0] * grid.virtual_pipeline
        for forward, chunk in passes(grid, stage, micro_batches):
            there[chunk] += 1 if forward else -1
            assert there[chunk] >= 0
        order = list(passes(grid, stage, micro_batches))
        assert there == [0] * grid.virtual_pipeline and len(order) == 2 * micro_batches * grid.virtual_pipeline


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 4)])
def test_the_order_is_megatron_cores(stages, chunks, micro_batches):
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(micro_batches, chunks, stages)
    for stage in range(stages):
        order = list(passes(Grid(pipeline=stages, virtual_pipeline=chunks), stage, micro_batches))
        assert [chunk for forward, chunk in order if forward] == [chunk for _, chunk in table]
        assert [chunk for forward, chunk in order if not forward] == [chunks - 1 - chunk for _, chunk in table]


@pytest.mark.parametrize(
    ("stages", "chunks", "stage", "micro_batches", "in_flight"),
    [
        (1, 1, 0, 7, 1),
        (4, 1, 0, 9, 4),
        (4, 1, 3, 9, 1),
        (4, 1, 0, 2, 2),
        (4, 2, 0, 8, 11),
        (4, 2, 3, 8, 5),
        (2, 2, 0, 2, 4),
    ],
)
def test_passes_in_flight_by_hand(stages, chunks, stage, micro_batches, in_flight):
    """Plain: stages - stage. Interleaved: 2 x (stages - stage - 1) + (chunks - 1) x stages + 1. At most all there are."""
    grid = Grid(pipeline=stages, virtual_pipeline=chunks)
    found = alive(grid, stage, micro_batches, [Bytes(10, 11, 15)] * chunks)
    assert found.in_flight == in_flight
    assert found.peak == (in_flight - 1) * 10 + 15


def test_the_peak_may_be_in_a_forward_pass():
    assert alive(Grid(), 0, 3, [Bytes(10, 90, 15)]).peak == 90


@pytest.mark.parametrize(
    ("stages", "chunks", "rounds"), [(1, 1, 3), (2, 1, 2), (4, 1, 3), (2, 2, 2), (4, 2, 2), (4, 3, 1)]
)
@pytest.mark.parametrize("backward", [1, 2, 3])
def test_idle_slots_are_those_of_a_pipeline_that_is_run(stages, chunks, rounds, backward):
    """A forward takes 1, a backward 1 to 3; each pass begins when its stage is free and what it needs has come."""
    grid, micro_batches = Grid(pipeline=stages, virtual_pipeline=chunks), rounds * stages
    found = slots(grid, micro_batches)
    assert ends_at(grid, micro_batches, backward) == (found.busy + found.idle) * (1 + backward)
    assert found.bubble == (stages - 1) / (stages - 1 + chunks * micro_batches)


def ends_at(grid, micro_batches, backward):
    """When the last pass of all stages ends."""
    waiting = [list(passes(grid, stage, micro_batches)) for stage in range(grid.pipeline)]
    free, done, count = [0] * grid.pipeline, {}, {}
    while any(waiting):
        for stage, left in enumerate(waiting):
            if not left:
                continue
            forward, chunk = left[0]
            number = count.get((stage, forward, chunk), 0)
            # places along the whole model; a backward waits for the next place's backward, at the end for its forward
            place, last = chunk * grid.pipeline + stage, grid.pipeline * grid.virtual_pipeline - 1
            needs = (True, place - 1) if forward else (False, place + 1) if place < last else (True, place)
            if (*needs, number) not in done and place - forward >= 0:
                continue
            left.pop(0)
            start = max(free[stage], done.get((*needs, number), 0))
            free[stage] = done[forward, place, number] = start + (1 if forward else backward)
            count[stage, forward, chunk] = number + 1
    return max(free)
