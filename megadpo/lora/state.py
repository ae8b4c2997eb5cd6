"""Adapters in checkpoints. Tensors have names and numbers of the whole model, so any layout can read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor

from megadpo.config.grid import Grid
from megadpo.lora.attach import TRAINED, adapters_of
from megadpo.lora.targets import Target, megatron_module


def sharded_adapters(model: Sequence[Any], grid: Grid) -> dict[str, dict[str, ShardedTensor]]:
    """For each of this rank's chunks: name in the chunk -> its part of the whole tensor. The experts of a layer are stacked
    along dim 0."""
    return {f"model{number}": _of_chunk(chunk, grid) for number, chunk in enumerate(model)}


def _of_chunk(chunk: Any, grid: Grid) -> dict[str, ShardedTensor]:
    state = {}
    for where, adapter in adapters_of(chunk):
        expert = adapter.target.entry.expert
        cut_rank, replica = (grid.tp_rank, grid.replica) if expert is None else (grid.etp_rank, grid.expert_replica)
        stacked = [] if expert is None else [(0, expert, chunk.config.num_moe_experts)]
        for name, parameter in adapter.named_parameters():
            cut_dim: int | None = parameter.cut_dim  # type: ignore[attr-defined]
            cut = [] if cut_dim is None else [(len(stacked) + cut_dim, cut_rank, adapter.cut.size)]
            state[f"{where}.{name}"] = ShardedTensor.from_rank_offsets(
                checkpoint_key(adapter.target, name),
                parameter,
                *stacked,
                *cut,
                replica_id=(0, 0 if cut else cut_rank, replica),
                prepend_axis_num=len(stacked),
            )
    return state


def checkpoint_key(target: Target, name: str) -> str:
    """Such as decoder.layers.0.self_attention.linear_qkv.lora.A_q_proj; for experts without their number."""
    return f"{layer_key(target)}.{TRAINED}.{name}"


def layer_key(target: Target) -> str:
    module, expert = megatron_module(target.entry), target.entry.expert
    return module if expert is None else module.replace(f"local_experts.{expert}.", "experts.")


def index_of(target: Target) -> tuple[int, ...]:
    """Its index in the leading dimensions of that tensor."""
    return () if target.entry.expert is None else (target.entry.expert,)
