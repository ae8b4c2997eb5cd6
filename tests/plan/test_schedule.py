"""The order of passes against megatron-core's own tables, and what is alive on the way."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.plan.grid import Grid
from megadpo.plan.schedule import alive, passes


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
