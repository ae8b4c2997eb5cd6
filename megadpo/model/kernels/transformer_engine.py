"""Transformer Engine's fused attention in its packed (thd) form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import RaggedKernel, RaggedPlan

if TYPE_CHECKING:
    import torch
    import transformer_engine.pytorch as te
else:
    torch, te = Lazy("torch"), Lazy("transformer_engine.pytorch")


@ATTENTION_KERNELS.add("transformer_engine")
class TransformerEngineKernel(RaggedKernel):
    """`padding_causal_bottom_right` covers plain packing and shared prompts alike (cuDNN 9.7 or newer, sm_90)."""

    name = package = "transformer_engine"

    def __init__(self) -> None:
        self._modules: dict[tuple[int, int, int], torch.nn.Module] = {}

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
            module.unfused_attention = _no_unfused()
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


def _no_unfused() -> torch.nn.Module:
    """Takes the place of the backend that DotProductAttention falls back to without a word where no fused kernel fits:
    it pads every segment to the longest, keeps all scores, and waits for the GPU at every segment."""

    class NoUnfused(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> NoReturn:
            expected = (
                "a kernel that Transformer Engine has fused attention for on this GPU; for this model it found none"
                " (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 print why)"
            )
            raise ConfigError([Problem(ATTENTION_KERNELS.field, "transformer_engine", expected, "use 'varlen'")])

    return NoUnfused()
