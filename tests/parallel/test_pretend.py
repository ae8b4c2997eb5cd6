"""The pretend world: any rank of any layout in one process, gone without a trace afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megadpo.config.grid import Grid
from megadpo.parallel.pretend import pretend_rank

SMALLEST = Grid(tensor=8, pipeline=4)


@pytest.mark.parametrize(("rank", "place"), [(0, (0, 0, 0)), (13, (5, 1, 0)), (511, (7, 15, 3))])
def test_a_rank_knows_its_place_among_512(rank, place):
    with pretend_rank(SMALLEST.over(512).at(rank)) as parallel:
        assert (parallel.grid.tp_rank, parallel.grid.dp_rank, parallel.grid.pp_rank) == place
        assert (parallel.world_size, parallel.grid.data, parallel.device.type) == (512, 16, "meta")
        assert dist.get_world_size(parallel.tp_group) == 8
        dist.all_reduce(torch.empty(3, device="meta"), group=parallel.dp_group)  # returns at once


def test_nothing_stays_behind():
    with pretend_rank(SMALLEST):  # megatron-core is redirected to the CPU for good
        pass
    before = torch.cuda.current_device, torch.Tensor.type, torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), pretend_rank(SMALLEST.over(64).at(40)):
        raise ZeroDivisionError
    assert not dist.is_initialized()
    assert (torch.cuda.current_device, torch.Tensor.type) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_type_names_on_meta_are_those_that_megatron_core_compares():
    with pretend_rank(SMALLEST):
        assert torch.empty(1, device="meta", dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.empty(1, device="meta").type() == "torch.cuda.FloatTensor"


def test_a_real_world_is_left_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="has joined a real world"), pretend_rank(SMALLEST):
            pass
    finally:
        dist.destroy_process_group()
