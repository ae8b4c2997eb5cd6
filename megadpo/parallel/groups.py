"""Process groups: the layout of a run, and the only importer of megatron-core's parallel_state.

World ranks are ordered tp - cp - ep - dp - pp (megatron-core's default), so tensor-parallel ranks are neighbours.
Experts have a grid of their own over the ranks of a stage, ordered expert tensor - expert - expert data: its sizes need
not be the dense layers', and the data-parallel size of an expert is what remains of the stage.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megadpo.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; the data-parallel size is what remains of the world."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks that each pipeline stage holds."""
    sequence_parallel: bool = False
    expert: int = 1
    """Ranks that share out the experts of a layer."""
    expert_tensor: int = 1
    """Ranks that cut each expert."""
    context: int = 1
    """Ranks that share out the tokens of each micro-batch."""

    def data(self, world_size: int) -> int:
        """Data-parallel size in a world of `world_size` ranks; ValueError where it does not divide."""
        model_ranks = self.tensor * self.pipeline * self.context
        if world_size % model_ranks:
            raise ValueError(
                f"world size {world_size} is not a multiple of tensor x pipeline x context = {model_ranks}"
            )
        return world_size // model_ranks


def layout_of(cfg: Config) -> Layout:
    """The layout that the config asks for."""
    megatron = cfg.policy.megatron_cfg
    return Layout(
        tensor=megatron.tensor_model_parallel_size,
        pipeline=megatron.pipeline_model_parallel_size,
        virtual_pipeline=megatron.virtual_pipeline_model_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        expert=megatron.expert_model_parallel_size,
        expert_tensor=megatron.expert_tensor_parallel_size,
        context=megatron.context_parallel_size,
    )


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the layout, and the groups it talks in."""

    layout: Layout
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    ep_rank: int = 0
    etp_rank: int = 0
    cp_rank: int = 0
    cp_group: dist.ProcessGroup | None = None

    @property
    def cp_size(self) -> int:
        return self.layout.context

    @property
    def tp_size(self) -> int:
        return self.layout.tensor

    @property
    def pp_size(self) -> int:
        return self.layout.pipeline

    @property
    def chunks_per_stage(self) -> int:
        return self.layout.virtual_pipeline

    def is_first_chunk(self, chunk: int) -> bool:
        """Whether this rank's chunk number `chunk` is where the model begins."""
        return self.pp_rank == 0 and chunk == 0

    def is_last_chunk(self, chunk: int) -> bool:
        """Whether this rank's chunk number `chunk` is where the model ends."""
        return self.pp_rank == self.pp_size - 1 and chunk == self.chunks_per_stage - 1

    def total_from_last_stage(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` in place over the data-parallel ranks of the last stage, for every rank of the world. Every
        context-parallel rank has the same number, which counts once.

        One all-reduce over dp, one broadcast over pp; the other stages' values don't count.
        """
        dist.all_reduce(tensor, group=self.dp_group)
        self.broadcast_from_last_stage(tensor)

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give every pipeline stage the last stage's `tensor` (same shape everywhere). One broadcast over pp."""
        if self.pp_size > 1:
            dist.broadcast(tensor, src=dist.get_global_rank(self.pp_group, self.pp_size - 1), group=self.pp_group)
        return tensor


def initialize(layout: Layout, device: torch.device, timeout_s: float = 1800.0) -> ParallelContext:
    """Join the world that torchrun describes in the environment (or a world of one) and make every group.

    Collectives: those of group creation, on all ranks. The caller has checked the layout against the world size.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        timeout = datetime.timedelta(seconds=timeout_s)
        if os.environ["WORLD_SIZE"] == "1" and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1, device_id=own)
        else:
            dist.init_process_group(backend, timeout=timeout, device_id=own)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        # None, not 1: megatron-core takes any number for the interleaved schedule
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=device.type == "cuda",  # on a CPU the groups are gloo already
    )
    return ParallelContext(
        layout=layout,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_group=parallel_state.get_context_parallel_group(),
    )


def destroy() -> None:
    """Leave every group and the world; a second call does nothing."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
