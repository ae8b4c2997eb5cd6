"""Process groups of the grid of ranks (config/grid.py), and the only importer of megatron-core's parallel_state."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megadpo.config.grid import Grid


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the grid of ranks, and its process groups."""

    grid: Grid
    device: torch.device
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    etp_group: dist.ProcessGroup
    """The ranks that share each expert's matrices (expert tensor parallel)."""
    host_group: dist.ProcessGroup
    """All ranks, with gloo: for numbers on the host, so that they don't wait for the GPU."""

    @property
    def rank(self) -> int:
        return self.grid.rank

    @property
    def world_size(self) -> int:
        return self.grid.world_size

    def total_from_last_stage(self, tensor: torch.Tensor) -> None:
        """Sum the last stage's `tensor` over its data-parallel ranks, and write the sum into `tensor` on every rank. Equal
        values of context-parallel ranks count once. Collectives: an all-reduce over dp, a broadcast over pp."""
        dist.all_reduce(tensor, group=self.dp_group)
        self.broadcast_from_last_stage(tensor)

    def largest(self, number: int) -> int:
        """The largest `number` of any rank, on every rank. One all-reduce on the host: it waits for the other ranks to call
        it, and not for what is queued on the GPU."""
        found = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(found.item())

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every pipeline stage the last stage's `tensor` (same shape everywhere). One broadcast over pp."""
        if self.grid.pipeline > 1:
            last = dist.get_global_rank(self.pp_group, self.grid.pipeline - 1)
            dist.broadcast(tensor, src=last, group=self.pp_group)
        return tensor


def initialize(sizes: Grid, device: torch.device) -> ParallelContext:
    """Join the world that torchrun describes in the environment (or a world of one) and make every group.

    sizes: `data` and `rank` are ignored; the world gives them. Raises ValueError where the other sizes don't divide the
    world. Collectives: those of group creation, on all ranks.
    """
    timeout = datetime.timedelta(minutes=30)
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=own)
        else:
            dist.init_process_group(backend, timeout=timeout, device_id=own)
    grid = sizes.over(dist.get_world_size()).at(dist.get_rank())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        # None, not 1: with any number megatron-core takes the interleaved schedule
        virtual_pipeline_model_parallel_size=grid.virtual_pipeline if grid.virtual_pipeline > 1 else None,
        context_parallel_size=grid.context,
        expert_model_parallel_size=grid.expert,
        expert_tensor_parallel_size=grid.expert_tensor,
        create_gloo_process_groups=device.type == "cuda",  # on a CPU the groups are gloo already
    )
    world = dist.group.WORLD
    assert world is not None
    return ParallelContext(
        grid=grid,
        device=device,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        etp_group=parallel_state.get_expert_tensor_parallel_group(),
        host_group=dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else world,
    )


def destroy() -> None:
    """Leave every group and the world; a second call does nothing."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
