"""Builds the policy or the reference of a run, on this rank's slice of the layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from megadpo.config.architecture import Architecture
from megadpo.config.schema_policy import PolicyConfig
from megadpo.model.gpt import PairModel
from megadpo.model.kernels import choose_kernel
from megadpo.model.transformer_config import DTYPES, transformer_config
from megadpo.parallel import ParallelContext


def build_model(
    arch: Architecture, policy: PolicyConfig, parallel: ParallelContext, *, frozen: bool
) -> list[PairModel]:
    """The chunks of this rank's stage (one, without a virtual pipeline), on its device, with memory for their weights
    but nothing in them yet.

    `frozen` (the reference): no gradients are ever asked of it, so it has no recomputation and no gradient buffers.
    Collectives: megatron-core's sum of tied embeddings over the embedding group at construction.
    """
    kernel = choose_kernel(policy.attention_kernel, parallel.device, DTYPES[policy.precision])
    config = transformer_config(arch, policy, parallel.device, recompute=not frozen)
    chunks = []
    for number in range(parallel.chunks_per_stage):
        chunk = PairModel(arch, config, parallel, kernel, policy.logprob_chunk_size, number)
        chunk.to(parallel.device)
        mark_sharded_parameters(chunk)
        if frozen:
            chunk.requires_grad_(False)
            chunk.eval()
        chunks.append(chunk)
    return chunks


def mark_sharded_parameters(model: torch.nn.Module) -> None:
    """Tell megatron-core which parameters are tensor-parallel shards and not copies.

    layers.py sets these marks only while it initialises weights (`perform_initialization`), which is off here. Without
    them the gradient norm counts one rank's shard as the whole parameter, and clips by the wrong number.
    """
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            shards = [(module.weight, 1)]
        elif isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            shards = [(module.weight, 0), (getattr(module, "bias", None), 0)]
        else:
            continue
        for parameter, dim in shards:
            if parameter is not None and not getattr(parameter, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def count_parameters(chunks: Iterable[torch.nn.Module]) -> int:
    """Parameters on this rank."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())
