"""torch's scaled_dot_product_attention, one call for each segment: on any device and in any dtype, mainly for float32 on GPUs.
Softcap and sinks, for which it has no argument, are computed by WrittenOut."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import AttentionKernel
from megadpo.model.kernels.by_segment import Piece, WrittenOut, attend_by_segment, pieces_of, seen

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional

    from megadpo.data.batches.pack import Segment
else:
    torch, functional = Lazy("torch"), Lazy("torch.nn.functional")


@dataclass(frozen=True)
class SdpaPlan:
    """The flat sequence of keys, cut at every border of a segment's range of keys; a segment's keys are a list of pieces."""

    window: int | None
    segments: tuple[Segment, ...]
    piece_lengths: list[int]
    pieces: list[list[int]]  # per segment, the key pieces in order
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # [n, m] bool, True = seen; made at first use

    def mask(self, segment: Segment, device: torch.device) -> Tensor | None:
        """The segment's mask; None for a plain causal square."""
        n, m = segment.query_tokens, segment.key_tokens
        if n == m and (self.window is None or m <= self.window):
            return None
        if (n, m) not in self.masks:
            self.masks[n, m] = seen(n, m, self.window, device)
        return self.masks[n, m]


@ATTENTION_KERNELS.add("sdpa")
class SdpaKernel(AttentionKernel):
    """Loops over segments. The backward of `split` adds the gradients of keys that several segments see."""

    name, priority = "sdpa", 0
    computes: ClassVar[Mapping[str, str]] = {
        "window": "a block of rows at a time, with only the keys in its window",
        "sinks": "stores the scores of some rows at a time",
        "softcap": "stores the scores of some rows at a time",
        "value_width": "directly",
    }

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> SdpaPlan:
        window, segments = pieces_of(segments, window)
        borders = sorted({0, *(border for segment in segments for keys in segment.keys for border in keys)})
        start_of = {start: i for i, start in enumerate(borders)}
        return SdpaPlan(
            window=window,
            segments=segments,
            piece_lengths=[b - a for a, b in itertools.pairwise(borders)],
            pieces=[[i for a, b in segment.keys for i in range(start_of[a], start_of[b])] for segment in segments],
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: SdpaPlan,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        if softcap is not None or sinks is not None:
            whole = tuple(Piece.of(segment, plan.window) for segment in plan.segments)
            one = WrittenOut(q.shape[2] ** -0.5 if scale is None else scale, softcap)
            return attend_by_segment(q, k, v, sinks, whole, one)
        grouped = q.shape[1] != k.shape[1]
        # split, not slicing: the backward of a slice writes a full-size tensor for every segment.
        queries = q.transpose(0, 1).split([segment.query_tokens for segment in plan.segments], dim=1)
        piece_lengths = [*plan.piece_lengths, k.shape[0] - sum(plan.piece_lengths)]  # the last: seen by no segment
        keys = k.transpose(0, 1).split(piece_lengths, dim=1)
        values = v.transpose(0, 1).split(piece_lengths, dim=1)
        outputs = []
        for query, pieces, segment in zip(queries, plan.pieces, plan.segments, strict=True):
            key = keys[pieces[0]] if len(pieces) == 1 else torch.cat([keys[i] for i in pieces], dim=1)
            value = values[pieces[0]] if len(pieces) == 1 else torch.cat([values[i] for i in pieces], dim=1)
            mask = plan.mask(segment, q.device)
            out = functional.scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=grouped,
            )
            outputs.append(out[0])
        return torch.cat(outputs, dim=1).transpose(0, 1)
