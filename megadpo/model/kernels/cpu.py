"""torch's flash attention for CPUs, one call for each segment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import AttentionKernel, widened
from megadpo.model.kernels.by_segment import Gradients, Piece, attend_by_segment, pieces_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megadpo.data.batches.pack import Segment
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class _Flash:
    """The operation that F.scaled_dot_product_attention calls on a CPU. Queries, keys and values must have one width."""

    scale: float | None
    """None: torch's default."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        alike = q.shape[3] == v.shape[3]
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *((q, k, v) if alike else _widened(q, k, v)),
            is_causal=piece.mask is None,
            attn_mask=piece.mask,
            scale=self.scale,
        )
        return out if alike else out[..., : v.shape[3]], log_sum

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, piece: Piece
    ) -> Gradients:
        alike = q.shape[3] == v.shape[3]
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *((grad, q, k, v, out) if alike else _widened(grad, q, k, v, out)),
            log_sum,
            0.0,
            piece.mask is None,
            attn_mask=piece.mask,
            scale=self.scale,
        )
        if alike:
            return Gradients(d_q, d_k, d_v)
        return Gradients(d_q[..., : q.shape[3]], d_k[..., : k.shape[3]], d_v[..., : v.shape[3]])


def _widened(*tensors: Tensor) -> list[Tensor]:
    width = max(x.shape[3] for x in tensors)
    return [widened(x, width) for x in tensors]


@ATTENTION_KERNELS.add("cpu")
class CpuKernel(AttentionKernel):
    """The kernel for CPUs with the least time and memory, in any floating dtype."""

    name, priority, only_on = "cpu", 1, "cpu"
    computes: ClassVar[Mapping[str, str]] = {
        "window": "a block of rows at a time, with only the keys in its window",
        "sinks": "from the log-sum-exp of scores",
        "value_width": "padded with zero channels",
    }

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> tuple[Piece, ...]:
        window, segments = pieces_of(segments, window)
        masks: dict[tuple[int, int], Tensor] = {}  # parts of segments have only a few shapes
        pieces = []
        for segment in segments:
            n, m = segment.query_tokens, segment.key_tokens
            mask = None
            if n != m or (window is not None and m > window):  # torch's own causal mask is aligned at the top left
                mask = masks[n, m] = masks[n, m] if (n, m) in masks else _mask(n, m, window, dtype)
            pieces.append(Piece.of(segment, window, mask))
        return tuple(pieces)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: tuple[Piece, ...],
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        assert softcap is None, "`computes` has no softcap"
        if scale is None and q.shape[2] != v.shape[2]:
            scale = q.shape[2] ** -0.5  # torch's default would depend on the padded width
        return attend_by_segment(q, k, v, sinks, plan, _Flash(scale))


def _mask(n: int, m: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[n, m]: 0 where seen, -inf where not."""
    mask = torch.full((n, m), -torch.inf, dtype=dtype).triu_(m - n + 1)
    return mask if window is None else mask.add_(torch.full_like(mask, -torch.inf).tril_(m - n - window))
