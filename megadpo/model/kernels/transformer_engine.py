"""Transformer Engine's fused attention in its packed (thd) form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import RaggedKernel, RaggedPlan

if TYPE_CHECKING:
    import torch
    import transformer_engine.pytorch as te
    from torch import Tensor
else:
    torch, te = Lazy("torch"), Lazy("transformer_engine.pytorch")


@ATTENTION_KERNELS.add("transformer_engine")
class TransformerEngineKernel(RaggedKernel):
    """Transformer Engine's DotProductAttention. The mask `padding_causal_bottom_right` is right for packs with and without
    shared prompts (cuDNN 9.7 or newer, sm_90). In packed form 2.11 has no fused attention with sinks
    (dot_product_attention/utils.py, "Filter: Softmax type")."""

    name = package = "transformer_engine"
    most_width = 256
    computes: ClassVar[Mapping[str, str]] = {"window": "fused attention's own", "value_width": "directly"}

    def __init__(self) -> None:
        self._modules: dict[tuple[int, int, int, int, float | None], torch.nn.Module] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: RaggedPlan,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert softcap is None and sinks is None, "`computes` has neither"
        sizes = (q.shape[1], k.shape[1], q.shape[2], v.shape[2])
        mask = "padding_causal" if plan.key_index is None else "padding_causal_bottom_right"
        kind = (*sizes, scale)
        if kind not in self._modules:
            self._modules[kind] = _module(*sizes, mask, scale).to(q.device)
        out: Tensor = self._modules[kind](
            q,
            k,
            v,
            qkv_format="thd",
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_kv=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_kv=plan.max_seqlen_k,
            attn_mask_type=mask,
            window_size=plan.window_size,
        )
        return out.view(*q.shape[:2], v.shape[2])


def _module(heads: int, groups: int, width: int, value_width: int, mask: str, scale: float | None) -> torch.nn.Module:
    module: torch.nn.Module = te.DotProductAttention(
        heads,
        width if value_width == width else (width, value_width),
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type=mask,
        attention_type="cross",  # a segment of a shared prompt has more keys than queries
        softmax_scale=scale,
    )
    module.unfused_attention = _no_unfused()
    return module


def _no_unfused() -> torch.nn.Module:
    """Replaces the backend that DotProductAttention uses silently if no fused kernel fits: that one pads every segment to the
    longest, keeps all scores, and waits for the GPU at every segment."""

    class NoUnfused(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> NoReturn:
            expected = (
                "a kernel that Transformer Engine has fused attention for on this GPU; for this model it found none"
                " (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 print why)"
            )
            raise ConfigError([Problem(ATTENTION_KERNELS.field, "transformer_engine", expected, "use 'varlen'")])

    return NoUnfused()
