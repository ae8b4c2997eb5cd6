"""Transformer Engine's fused attention in its packed (thd) form. Importing this needs Transformer Engine."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import transformer_engine.pytorch as te

from megadpo.config.problems import ConfigError, Problem
from megadpo.data.batches.pack import Segment
from megadpo.model.kernels.ragged import RaggedPlan, gather_keys, ragged_plan


class _NoUnfused(torch.nn.Module):
    """Takes the place of the backend that DotProductAttention falls back to without a word where no fused kernel fits:
    it pads every segment to the longest, keeps all scores, and waits for the GPU at every segment."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        expected = (
            "a kernel that Transformer Engine has fused attention for on this GPU; for this model it found none"
            " (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 print why)"
        )
        raise ConfigError([Problem("policy.attention_kernel", "transformer_engine", expected, "use 'varlen'")])


class TransformerEngineKernel:
    """`padding_causal_bottom_right` covers plain packing and shared prompts alike (cuDNN 9.7 or newer, sm_90)."""

    name = "transformer_engine"

    def __init__(self) -> None:
        self._modules: dict[tuple[int, int, int], torch.nn.Module] = {}

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> RaggedPlan:
        return ragged_plan(segments, device)

    def prepare(self, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan) -> tuple[torch.Tensor, torch.Tensor]:
        return gather_keys(k, plan), gather_keys(v, plan)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan) -> torch.Tensor:
        heads, groups, dim = q.shape[1], k.shape[1], q.shape[2]
        mask = "padding_causal" if plan.key_index is None else "padding_causal_bottom_right"
        if (heads, groups, dim) not in self._modules:
            module = te.DotProductAttention(
                heads,
                dim,
                num_gqa_groups=groups,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type=mask,
                attention_type="cross",  # a segment of a shared prompt has more keys than queries
            ).to(q.device)
            module.unfused_attention = _NoUnfused()
            self._modules[heads, groups, dim] = module
        out = self._modules[heads, groups, dim](
            q,
            k,
            v,
            qkv_format="thd",
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_kv=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_kv=plan.max_seqlen_k,
            attn_mask_type=mask,
        )
        return out.view(q.shape)
