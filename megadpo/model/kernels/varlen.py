"""torch's own flash attention over ragged segments (torch.nn.attention.varlen)."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

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
        grouped: dict[str, Any] = {"enable_gqa": True} if q.shape[1] != k.shape[1] and _wants_to_be_told() else {}
        ends = plan.cu_seqlens_q, plan.cu_seqlens_k, plan.max_seqlen_q, plan.max_seqlen_k
        out = varlen.varlen_attn(q, k, v, *ends, window_size=(-1, 0), **grouped)
        assert isinstance(out, torch.Tensor)  # a tuple only where the log-sum-exp is asked for
        return out


@functools.cache
def _wants_to_be_told() -> bool:
    """Whether fewer heads of keys have to be asked for. torch 2.11 takes them as they are."""
    return "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
