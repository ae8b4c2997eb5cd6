"""torch's flash attention for CPUs, one call a segment."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import AttentionKernel

if TYPE_CHECKING:
    import torch

    from megadpo.data.batches.pack import Segment
else:
    torch = Lazy("torch")


@dataclass(frozen=True)
class _Piece:
    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor | None
    """[n, m]: 0 where seen, -inf where not; None for a plain causal square."""


def _forward(ctx, q, k, v, plan):  # type: ignore[no-untyped-def]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    queries, keys, values, outputs = (_heads_first(x) for x in (q, k, v, out))
    partition_logs = []
    for piece in plan:
        seen = (_joined(keys, piece.keys), _joined(values, piece.keys))
        attended, log = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[:, :, piece.queries], *seen, is_causal=piece.mask is None, attn_mask=piece.mask
        )
        outputs[:, :, piece.queries] = attended
        partition_logs.append(log)
    if v.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        v = v.contiguous()  # values are a view of the whole projection, which would stay in memory with them
    ctx.save_for_backward(q, k, v, out, *partition_logs)
    ctx.plan = plan
    return out


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    q, k, v, out, *partition_logs = ctx.saved_tensors
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    queries, keys, values, outputs, grads = (_heads_first(x) for x in (q, k, v, out, grad))
    d_queries, d_keys, d_values = (_heads_first(x) for x in (d_q, d_k, d_v))
    for piece, log in zip(ctx.plan, partition_logs, strict=True):
        mine = piece.queries
        d_query, d_key, d_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[:, :, mine],
            queries[:, :, mine],
            _joined(keys, piece.keys),
            _joined(values, piece.keys),
            outputs[:, :, mine],
            log,
            0.0,
            piece.mask is None,
            attn_mask=piece.mask,
        )
        d_queries[:, :, mine] = d_query
        lengths = [part.stop - part.start for part in piece.keys]
        for part, of_key, of_value in zip(piece.keys, d_key.split(lengths, 2), d_value.split(lengths, 2), strict=True):
            d_keys[:, :, part] += of_key
            d_values[:, :, part] += of_value
    return d_q, d_k, d_v, None


@functools.cache
def _segment_attention() -> Any:
    """The autograd function of the two, made at first use: its base class is torch's, and a config is checked without
    torch.

    They call what F.scaled_dot_product_attention calls on a CPU. Called directly, outputs go straight to their place in
    the run, and keys that several segments see are joined anew in backward and not kept: for a shared prompt, joined
    keys and values are as large as everything else that attention keeps."""
    members = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
    return type("SegmentAttention", (torch.autograd.Function,), members)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] -> a view [1, H, T, D]."""
    return x.transpose(0, 1)[None]


def _joined(x: torch.Tensor, parts: tuple[slice, ...]) -> torch.Tensor:
    """The rows `parts` of x [1, G, T, D], in order; a view where there is one part."""
    return x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, part] for part in parts], dim=2)


@ATTENTION_KERNELS.add("cpu")
class CpuKernel(AttentionKernel):
    """The fastest and leanest on a CPU, in any floating dtype."""

    name, priority, only_on = "cpu", 1, "cpu"

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> tuple[_Piece, ...]:
        pieces = []
        for segment in segments:
            n, m = segment.query_tokens, segment.key_tokens
            mask = None
            if n != m:  # torch's own causal mask is aligned at the top left
                mask = torch.full((n, m), -torch.inf, dtype=dtype).triu_(m - n + 1)
            keys = tuple(slice(start, end) for start, end in segment.keys)
            pieces.append(_Piece(slice(segment.query_start, segment.query_end), keys, mask))
        return tuple(pieces)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: tuple[_Piece, ...]) -> torch.Tensor:
        attended: torch.Tensor = _segment_attention().apply(q, k, v, plan)
        return attended
