"""Sends and receives between pipeline stages that both know the shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection


class KnownShapes(P2PCommunicator):
    """megatron-core's sends and receives, without messages about shapes. For packs of different lengths megatron-core
    sends each shape ahead of its tensor, and the host waits for the GPU to read it (p2p_communication.py
    `_communicate_shapes`). Here every stage has the same micro-batches, so each knows the shape that comes next."""

    def __init__(self, config: ModelParallelConfig, tokens: Sequence[int], chunks: int) -> None:
        """For one run of the schedule. tokens: of each micro-batch on this rank. chunks: model chunks of each stage."""
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        turns = [(number, 0) for number in range(len(tokens))]
        if chunks > 1:
            turns = get_schedule_table(len(tokens), chunks, config.microbatch_group_size_per_vp_stage)
        # Backward takes the micro-batches in forward's order, and chunks from the last to the first. The last stage sends
        # nothing on to the first after the model's last chunk, nor back after its first chunk.
        around = [number for number, chunk in turns if chunk < chunks - 1]
        along = [number for number, _ in turns]
        stage, stages = self.pp_group.rank(), self.pp_group.size()
        self._forward = iter(around if stage == 0 else along)
        self._backward = iter(around if stage == stages - 1 else along)
        shards = parallel_state.get_tensor_model_parallel_world_size() if config.sequence_parallel else 1
        self._shapes = [[count // shards, 1, config.hidden_size] for count in tokens]

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        nothing = [0, 0, 0]
        return (
            self._shapes[next(self._forward)] if recv_prev else nothing,
            self._shapes[next(self._backward)] if recv_next else nothing,
        )


def pipeline_groups() -> ProcessGroupCollection:
    """The groups that the schedules need beside a communicator. (Without one they look these up themselves.)"""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups
