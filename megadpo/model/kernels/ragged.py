"""What the fused kernels share: segments as cumulative lengths, and the keys gathered by index."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megadpo.data.pack import Segment


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
    """Built on the CPU and sent over in one copy a tensor, so that no layer waits for the host."""
    query_lengths = [s.query_end - s.query_start for s in segments]
    key_lengths = [sum(b - a for a, b in s.keys) for s in segments]
    index = torch.cat([torch.arange(a, b) for s in segments for a, b in s.keys])
    plain = bool(len(index) == segments[-1].query_end and (index == torch.arange(len(index))).all())

    def cumulative(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True)

    return RaggedPlan(
        cu_seqlens_q=cumulative(query_lengths),
        cu_seqlens_k=cumulative(key_lengths),
        max_seqlen_q=max(query_lengths),
        max_seqlen_k=max(key_lengths),
        key_tokens=len(index),
        key_index=None if plain else index.to(device, non_blocking=True),
    )


def gather_keys(x: torch.Tensor, plan: RaggedPlan) -> torch.Tensor:
    """x [K, G, D] -> [key_tokens, G, D]; shared prompts appear once a segment that sees them."""
    return x[: plan.key_tokens] if plan.key_index is None else x.index_select(0, plan.key_index)
