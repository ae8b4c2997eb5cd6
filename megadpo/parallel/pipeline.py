"""Micro-batches through the model chunks of this rank's pipeline stage, by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megadpo.parallel.transfers import KnownShapes, pipeline_groups


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[Any],
    forward_step: Callable[..., Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run every micro-batch through every chunk: forward and backward (1F1B, interleaved where a stage has several
    chunks), or forward only.

    forward_step(iterator, chunk) -> (output, function of the last stage's output), as megatron-core wants it. Each chunk
    gets an iterator of its own over the same micro-batches; the last chunk's function sees them in order. Interleaved,
    their number must be a multiple of the pipeline stages. Returns that function's results on the last stage, an empty
    list elsewhere. Collectives: the pipeline's sends and receives, those of the chunks, and reductions of gradients.
    """
    config = get_model_config(chunks[0])
    hold_back = None if forward_only else _reductions_to_hold_back(chunks)
    # In a forward-only run megatron-core enters no_sync too, and only the garbage collector leaves it again.
    config.no_sync_func = hold_back
    transfers: dict[str, Any] = {}
    if config.pipeline_model_parallel_size > 1:
        tokens = [micro_batch.tokens.numel() for micro_batch in micro_batches]
        transfers = {"p2p_communicator": KnownShapes(config, tokens, len(chunks)), "pg_collection": pipeline_groups()}
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=1,  # packs differ in length: see KnownShapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
        **transfers,
    )


def _reductions_to_hold_back(chunks: Sequence[Any]) -> Any:
    """`no_sync` of DDP-wrapped chunks that reduce gradients during the backward pass: only the last micro-batch's may
    be reduced. The schedules take one function; the interleaved one also takes a list."""
    if not chunks[0].ddp_config.overlap_grad_reduce:
        return None
    return chunks[0].no_sync if len(chunks) == 1 else [chunk.no_sync for chunk in chunks]
