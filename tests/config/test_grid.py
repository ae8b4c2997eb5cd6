"""A rank's place in the grid against megatron-core's own groups."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.grid import Grid

SIZES = {name: st.integers(1, 3) for name in ("tensor", "context", "data", "pipeline")}


@pytest.mark.parametrize(
    ("sizes", "expert"),
    [
        ({"tensor": 2, "context": 2, "data": 2, "pipeline": 2}, (1, 1)),
        ({"tensor": 4, "data": 3, "pipeline": 2}, (3, 2)),
    ],
)
def test_places_are_those_of_megatron_cores_groups(sizes, expert):
    from megatron.core.parallel_state import RankGenerator

    grid = Grid(**sizes, expert=expert[0], expert_tensor=expert[1])
    dense = RankGenerator(grid.tensor, 1, grid.data, grid.pipeline, grid.context, "tp-cp-ep-dp-pp")
    experts = RankGenerator(*reversed(expert), grid.expert_replicas, grid.pipeline, 1, "tp-cp-ep-dp-pp")
    generators = {
        "tp_rank": (dense, "tp"),
        "cp_rank": (dense, "cp"),
        "dp_rank": (dense, "dp"),
        "pp_rank": (dense, "pp"),
        "replica": (dense, "dp-cp"),
        "etp_rank": (experts, "tp"),
        "ep_rank": (experts, "ep"),
        "expert_replica": (experts, "dp"),
    }
    for name, (generator, dimension) in generators.items():
        for group in generator.get_ranks(dimension):
            assert [getattr(grid.at(rank), name) for rank in group] == list(range(len(group))), name


@given(st.fixed_dictionaries(SIZES), st.data())
def test_every_rank_has_one_place_and_the_place_tells_the_rank(sizes, data):
    grid = Grid(**sizes)
    rank = data.draw(st.integers(0, grid.world_size - 1))
    place = grid.at(rank)
    assert place.cp_rank + grid.context * place.dp_rank == place.replica
    assert rank == place.tp_rank + grid.tensor * place.replica + grid.stage_ranks * place.pp_rank
    assert dataclasses.replace(place, rank=0) == grid


def test_the_model_begins_on_the_first_stage_and_ends_on_the_last():
    grid = Grid(tensor=2, pipeline=3, virtual_pipeline=2)
    ends = [(stage, chunk) for stage in range(3) for chunk in range(2) if grid.stage(stage).is_last_chunk(chunk)]
    starts = [(stage, chunk) for stage in range(3) for chunk in range(2) if grid.stage(stage).is_first_chunk(chunk)]
    assert (starts, ends) == ([(0, 0)], [(2, 1)]) and str(
        grid
    ) == "tensor 2 x pipeline 3 x data 1, model chunks a stage 2"


def test_a_rank_outside_of_the_world_is_no_place():
    with pytest.raises(ValueError, match="rank 4 of a world of 4"):
        Grid(tensor=2, data=2, rank=4)


def test_the_data_parallel_size_is_what_remains_of_the_world():
    assert Grid(tensor=2, pipeline=2).over(8) == Grid(tensor=2, pipeline=2, data=2)
    assert Grid(tensor=2, pipeline=2, context=2).over(16).data == 2
    for world_size in (0, 2, 6):
        with pytest.raises(ValueError, match=f"world size {world_size} is not a multiple of .* = 4"):
            Grid(tensor=2, pipeline=2).over(world_size)
