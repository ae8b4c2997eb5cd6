"""torch's scaled_dot_product_attention, one call a segment: on any device and in any dtype, float32 on GPUs above all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megadpo.config.variants import ATTENTION_KERNELS, Lazy
from megadpo.model.kernels import AttentionKernel

if TYPE_CHECKING:
    import torch
    from torch.nn import functional

    from megadpo.data.batches.pack import Segment
else:
    torch, functional = Lazy("torch"), Lazy("torch.nn.functional")


@dataclass(frozen=True)
class SdpaPlan:
    """The flat run of keys cut at every border of a range of keys; segments name their pieces."""

    query_lengths: list[int]
    piece_lengths: list[int]
    pieces: list[list[int]]  # per segment, the key pieces in order
    masks: list[torch.Tensor | None]  # per segment [n, m] bool, True = seen; None for a plain causal square


@ATTENTION_KERNELS.add("sdpa")
class SdpaKernel(AttentionKernel):
    """Loops over segments. Gradients of keys shared by several segments add up through `split`."""

    name, priority = "sdpa", 0

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> SdpaPlan:
        borders = sorted({0, *(border for segment in segments for keys in segment.keys for border in keys)})
        start_of = {start: i for i, start in enumerate(borders)}
        pieces, masks = [], []
        for segment in segments:
            pieces.append([i for a, b in segment.keys for i in range(start_of[a], start_of[b])])
            n, m = segment.query_tokens, segment.key_tokens
            masks.append(None if n == m else torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n))
        return SdpaPlan(
            query_lengths=[s.query_tokens for s in segments],
            piece_lengths=[b - a for a, b in itertools.pairwise(borders)],
            pieces=pieces,
            masks=masks,
        )

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: SdpaPlan) -> torch.Tensor:
        grouped = q.shape[1] != k.shape[1]
        # split, not slicing: the backward of a slice writes a full-size tensor for every segment.
        queries = q.transpose(0, 1).split(plan.query_lengths, dim=1)
        piece_lengths = [*plan.piece_lengths, k.shape[0] - sum(plan.piece_lengths)]  # the last: seen by no segment
        keys = k.transpose(0, 1).split(piece_lengths, dim=1)
        values = v.transpose(0, 1).split(piece_lengths, dim=1)
        outputs = []
        for query, pieces, mask in zip(queries, plan.pieces, plan.masks, strict=True):
            key = keys[pieces[0]] if len(pieces) == 1 else torch.cat([keys[i] for i in pieces], dim=1)
            value = values[pieces[0]] if len(pieces) == 1 else torch.cat([values[i] for i in pieces], dim=1)
            out = functional.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
            outputs.append(out[0])
        return torch.cat(outputs, dim=1).transpose(0, 1)
