"""torch's own flash attention over ragged segments (torch.nn.attention.varlen), for bfloat16 on CUDA."""

from __future__ import annotations

import torch
from torch.nn.attention.varlen import varlen_attn

from megadpo.data.batches.pack import Segment
from megadpo.model.kernels.ragged import RaggedPlan, gather_keys, ragged_plan


class VarlenKernel:
    """window (-1, 0): everything to the left, nothing to the right, aligned at the bottom right as flash does."""

    name = "varlen"

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> RaggedPlan:
        return ragged_plan(segments, device)

    def prepare(self, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        return gather_keys(k, plan), gather_keys(v, plan)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:  # torch 2.11 has no enable_gqa here
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = varlen_attn(
            q, k, v, plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k, window_size=(-1, 0)
        )
        assert isinstance(out, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
        return out
