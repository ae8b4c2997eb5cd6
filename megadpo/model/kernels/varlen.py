"""torch's own flash attention over ragged segments (torch.nn.attention.varlen)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import RaggedKernel, RaggedPlan

if TYPE_CHECKING:
    import torch
    from torch.nn.attention import varlen
else:
    torch, varlen = Lazy("torch"), Lazy("torch.nn.attention.varlen")


@ATTENTION_KERNELS.add("varlen")
class VarlenKernel(RaggedKernel):
    """window (-1, 0): everything to the left, nothing to the right, aligned at the bottom right as flash does."""

    name, priority = "varlen", 2

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:  # torch 2.11 has no enable_gqa here
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = varlen.varlen_attn(
            q, k, v, plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k, window_size=(-1, 0)
        )
        assert isinstance(out, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
        return out
