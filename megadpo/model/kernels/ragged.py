"""What the fused kernels share: segments as cumulative lengths, and the keys gathered by index."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from megadpo.data.batches.pack import Segment
from megadpo.parallel import send


@dataclass(frozen=True)
class RaggedPlan:
    """Segments as the varlen kernels take them; `key_index` is None where the keys are the flat run itself, or under
    context parallelism its first tokens."""

    cu_seqlens_q: torch.Tensor  # [segments + 1] int32
    cu_seqlens_k: torch.Tensor  # [segments + 1] int32
    max_seqlen_q: int
    max_seqlen_k: int
    key_tokens: int  # sum of key lengths
    key_index: torch.Tensor | None  # [key_tokens] int64


def ragged_plan(segments: tuple[Segment, ...], device: torch.device) -> RaggedPlan:
    """Built on the CPU and sent over in one copy a tensor, through pinned memory: nothing waits for the device."""
    query_lengths = [s.query_tokens for s in segments]
    key_lengths = [s.key_tokens for s in segments]
    ranges = [keys for s in segments for keys in s.keys]
    ends = [0, *(end for _, end in ranges)]
    plain = ends[-1] == segments[-1].query_end and all(a == end for (a, _), end in zip(ranges, ends, strict=False))

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return send(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)

    index = None if plain else send(torch.cat([torch.arange(a, b) for a, b in ranges]), device)

    return RaggedPlan(
        cu_seqlens_q=cumulative(query_lengths),
        cu_seqlens_k=cumulative(key_lengths),
        max_seqlen_q=max(query_lengths),
        max_seqlen_k=max(key_lengths),
        key_tokens=sum(key_lengths),
        key_index=index,
    )


def gather_keys(x: torch.Tensor, plan: RaggedPlan) -> torch.Tensor:
    """x [K, G, D] -> [key_tokens, G, D]; shared prompts appear once a segment that sees them."""
    return x[: plan.key_tokens] if plan.key_index is None else x.index_select(0, plan.key_index)
