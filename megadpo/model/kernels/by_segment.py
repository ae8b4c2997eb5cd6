"""Attention one segment after another, in one autograd function for all segments; and an exact attention that stores scores.

Outputs are written directly to their place. Keys that several segments see are joined again in backward and not kept: with
shared prompts, joined keys and values are as large as everything else that attention keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megadpo.config.variants import Lazy
from megadpo.model.kernels import reached, sinks_gradient, with_sinks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megadpo.data.batches.pack import Segment
else:
    torch = Lazy("torch")

FEWEST_ROWS, MOST_ROWS = 128, 512
"""Rows in one part of a segment that is longer than its window. A part sees its own rows and a window of keys before them."""
MOST_SCORES = 1 << 24
"""The most scores that WrittenOut stores at a time: 64 MiB in float32."""


def pieces_of(segments: tuple[Segment, ...], window: int | None) -> tuple[int | None, tuple[Segment, ...]]:
    """The window (None if it masks nothing) and the segments. Those longer than the window are cut into parts of rows with only
    the keys that the rows see, so work and masks grow with tokens times window."""
    window = reached(segments, window)
    if window is None:
        return None, segments
    rows = min(max(window // 2, FEWEST_ROWS), MOST_ROWS)
    return window, tuple(piece for segment in segments for piece in _in_parts(segment, window, rows))


def _in_parts(segment: Segment, window: int, rows: int) -> Iterator[Segment]:
    if segment.key_tokens <= window:
        yield segment
        return
    for first in range(0, segment.query_tokens, rows):
        yield segment.rows(first, min(first + rows, segment.query_tokens), window)


def seen(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """[n, m] bool: which of the m keys each of the n queries sees. The last query's own key is the last one."""
    mask = torch.ones(n, m, dtype=torch.bool, device=device).tril_(m - n)
    return mask if window is None else mask.triu_(m - n - window + 1)


@dataclass(frozen=True)
class Piece:
    """Queries of one segment, or of a part of one, and the keys that they see."""

    queries: slice
    keys: tuple[slice, ...]
    window: int | None
    mask: Tensor | None = None
    """[n, m] for kernels that need one; None also for a plain causal square."""

    @classmethod
    def of(cls, segment: Segment, window: int | None, mask: Tensor | None = None) -> Piece:
        keys = tuple(slice(start, end) for start, end in segment.keys)
        return cls(slice(segment.query_start, segment.query_end), keys, window, mask)


class Gradients(NamedTuple):
    """The gradients of a piece's queries, keys and values, each with its tensor's shape and dtype."""

    q: Tensor
    k: Tensor
    v: Tensor


class OnePiece(Protocol):
    """Attention of one piece: q [1, H, n, D], k [1, G, m, D], v [1, G, m, E]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """-> [1, H, n, E] and the log-sum-exp of its scores [1, H, n], in float32 at least."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, piece: Piece
    ) -> Gradients:
        """The gradients, from that of the output. out, log_sum: the result of `forward`, or of `with_sinks` for it."""


def attend_by_segment(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, pieces: tuple[Piece, ...], one: OnePiece
) -> Tensor:
    """q [T, H, D], k [K, G, D], v [K, G, E], sinks [H] -> [T, H, E]. Each query is in exactly one piece."""
    attended: Tensor = _segment_attention().apply(q, k, v, sinks, pieces, one)
    return attended


def _forward(ctx, q, k, v, sinks, pieces, one):  # type: ignore[no-untyped-def]
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    queries, keys, values, outputs = (_heads_first(x) for x in (q, k, v, out))
    log_sums = []
    for piece in pieces:
        attended, log_sum = one.forward(
            queries[:, :, piece.queries], _joined(keys, piece.keys), _joined(values, piece.keys), piece
        )
        if sinks is not None:
            attended, log_sum = with_sinks(attended, log_sum, sinks)
        outputs[:, :, piece.queries] = attended
        log_sums.append(log_sum)
    if v.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        v = v.contiguous()  # values are a view of the whole QKV projection, which would stay in memory with them
    ctx.save_for_backward(q, k, v, sinks, out, *log_sums)
    ctx.pieces, ctx.one = pieces, one
    return out


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    q, k, v, sinks, out, *log_sums = ctx.saved_tensors
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_sinks: Any = None
    queries, keys, values, outputs, grads = (_heads_first(x) for x in (q, k, v, out, grad))
    d_queries, d_keys, d_values = (_heads_first(x) for x in (d_q, d_k, d_v))
    for piece, log_sum in zip(ctx.pieces, log_sums, strict=True):
        mine = piece.queries
        found = ctx.one.backward(
            grads[:, :, mine],
            queries[:, :, mine],
            _joined(keys, piece.keys),
            _joined(values, piece.keys),
            outputs[:, :, mine],
            log_sum,
            piece,
        )
        d_queries[:, :, mine] = found.q
        lengths = [part.stop - part.start for part in piece.keys]
        for part, of_key, of_value in zip(
            piece.keys, found.k.split(lengths, 2), found.v.split(lengths, 2), strict=True
        ):
            d_keys[:, :, part] += of_key
            d_values[:, :, part] += of_value
        if sinks is not None:
            of_sinks = sinks_gradient(grads[0, :, mine], outputs[0, :, mine], log_sum[0], sinks)
            d_sinks = of_sinks if d_sinks is None else d_sinks + of_sinks
    return d_q, d_k, d_v, None if sinks is None else d_sinks.to(sinks.dtype), None, None


@functools.cache
def _segment_attention() -> Any:
    """The autograd function of `_forward` and `_backward`. Made at first use, because its base class is torch's, and a config
    is checked without torch."""
    members = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
    return type("SegmentAttention", (torch.autograd.Function,), members)


def _heads_first(x: Tensor) -> Tensor:
    """[T, H, D] -> a view [1, H, T, D]."""
    return x.transpose(0, 1)[None]


def _joined(x: Tensor, parts: tuple[slice, ...]) -> Tensor:
    """The rows `parts` of x [1, G, T, D], in order; a view if there is only one part."""
    return x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, part] for part in parts], dim=2)


@dataclass(frozen=True)
class WrittenOut:
    """Attention that stores the scores, some rows at a time, and computes them again in backward. The softmax is in float32 at
    least."""

    scale: float
    softcap: float | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        heads, groups = q.shape[1], k.shape[1]
        out, log_sum = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=_wide(q))
        for rows, behind in _blocks(q, k):
            scores, _ = self._scores(_by_group(q[0, :, rows], groups), k[0, :, :behind], piece, rows, k.shape[2])
            log = scores.logsumexp(-1)
            weights = scores.sub_(log[..., None]).exp_().to(v.dtype)
            out[0, :, rows] = _by_head(weights @ v[0, :, :behind], heads)
            log_sum[0, :, rows] = log.view(heads, -1)
        return out, log_sum

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, piece: Piece
    ) -> Gradients:
        heads, groups = q.shape[1], k.shape[1]
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros(x.shape[1:], dtype=_wide(x), device=x.device) for x in (k, v))
        for rows, behind in _blocks(q, k):
            query, upward, attended = (_by_group(x[0, :, rows], groups) for x in (q, grad, out))
            key, value = k[0, :, :behind], v[0, :, :behind]
            scores, slope = self._scores(query, key, piece, rows, k.shape[2])
            weights = scores.sub_(log_sum[0, :, rows].reshape(groups, -1, 1)).exp_()
            d_v[:, :behind] += weights.to(v.dtype).mT @ upward
            along = (upward.to(weights.dtype) * attended).sum(-1, keepdim=True)
            d_scores = (upward @ value.mT).to(weights.dtype).sub_(along).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            d_scores = d_scores.mul_(self.scale).to(q.dtype)
            d_q[0, :, rows] = _by_head(d_scores @ key, heads)
            d_k[:, :behind] += d_scores.mT @ query
        return Gradients(d_q, d_k[None].to(k.dtype), d_v[None].to(v.dtype))

    def _scores(self, query: Tensor, key: Tensor, piece: Piece, rows: slice, keys: int) -> tuple[Tensor, Tensor | None]:
        """[G, heads x rows, keys up to the last row's] scores, -inf for keys that a query doesn't see; and with a softcap its
        derivative."""
        scores, slope = (query @ key.mT).to(_wide(query)).mul_(self.scale), None
        if self.softcap is not None:
            tanh = scores.div_(self.softcap).tanh_()
            slope = 1 - tanh.square()
            scores = tanh.mul_(self.softcap)
        n = rows.stop - rows.start
        mask = seen(n, key.shape[1], piece.window, query.device)
        return scores.view(len(key), -1, n, key.shape[1]).masked_fill_(~mask, -torch.inf).view_as(scores), slope


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """Blocks of rows of the queries [1, H, n, D] with at most MOST_SCORES scores, and for each block how many of the keys
    [1, G, m, D] its last row sees."""
    (heads, n), m = q.shape[1:3], k.shape[2]
    size = max(1, MOST_SCORES // (heads * m))
    for first in range(0, n, size):
        last = min(first + size, n)
        yield slice(first, last), m - n + last


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[H, n, D] -> [G, H / G x n, D]."""
    return x.reshape(groups, -1, x.shape[-1])


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[G, H / G x n, D] -> [H, n, D]."""
    return x.view(heads, -1, x.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
