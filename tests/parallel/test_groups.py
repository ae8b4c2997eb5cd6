"""Layouts and the groups they make."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megadpo.config.grid import Grid
from megadpo.parallel import initialize, setup_device
from tests.helpers.distributed import run_distributed


def places_and_totals():
    parallel = initialize(Grid(tensor=2, pipeline=2, virtual_pipeline=2), setup_device("auto"))
    total = torch.tensor([10.0 ** dist.get_rank()])
    parallel.total_from_last_stage(total)
    ends = parallel.grid.is_first_chunk(0), parallel.grid.is_last_chunk(1)
    place = (parallel.grid.tp_rank, parallel.grid.pp_rank, parallel.grid.dp_rank, *ends)
    assert not parallel.grid.is_first_chunk(1) and not parallel.grid.is_last_chunk(0)
    return place, total.item()


@pytest.mark.distributed
def test_tensor_parallel_ranks_are_neighbours_and_totals_come_from_the_last_stage():
    results = run_distributed(places_and_totals, 4, init_process_group=False)
    assert [place for place, _ in results] == [
        (0, 0, 0, True, False),
        (1, 0, 0, True, False),
        (0, 1, 0, False, True),
        (1, 1, 0, False, True),
    ]
    # pp group of rank 0 is {0, 2}, of rank 1 {1, 3}: each gets its last stage's number
    assert [total for _, total in results] == [100.0, 1000.0, 100.0, 1000.0]


def context_places():
    parallel = initialize(Grid(context=2), setup_device("auto"))
    total = torch.tensor([10.0 ** dist.get_rank()])
    parallel.total_from_last_stage(total)
    return (
        parallel.grid.cp_rank,
        parallel.grid.dp_rank,
        parallel.grid.data,
        dist.get_process_group_ranks(parallel.cp_group),
        total.item(),
    )


@pytest.mark.distributed
def test_context_parallel_ranks_are_neighbours_and_count_once():
    assert run_distributed(context_places, 4, init_process_group=False) == [
        (0, 0, 2, [0, 1], 101.0),
        (1, 0, 2, [0, 1], 1010.0),
        (0, 1, 2, [2, 3], 101.0),
        (1, 1, 2, [2, 3], 1010.0),
    ]
