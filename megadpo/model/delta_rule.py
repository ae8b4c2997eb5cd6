"""The gated delta rule on packs: recurrent states of all texts of a pack at once, answers from their prompt's state on.

Yang et al., Gated Delta Networks (arXiv 2412.06464), section 3.1. Of one head, with its state S [D, E], zero before a text's
first token, and token t's query q, key k [D], value v [E], decay a = exp(log_decay) and strength b:

    S_t = a_t S_(t-1) + k_t (x) u_t,   u_t = b_t (v_t - (a_t S_(t-1))^T k_t)         what is new in v_t
    o_t = S_t^T q_t

Tokens go in chunks of C. With S the state before a chunk, g_i the sum of log decays of its tokens 1..i, and the rows of
Q, K, V, U its tokens' (section 3.3 there; the delta rule's u of a chunk solve one triangular system, arXiv 2406.06484):

    (I + L) U = b V - b e^g K S,   L_ij = b_i e^(g_i - g_j) k_i.k_j for j < i
    O = e^g Q S + (e^(g_i - g_j) q_i.k_j for j <= i) U
    S' = e^(g_C) S + (e^(g_C - g) K)^T U

Only U and S' need the chunk before; all else is computed for all chunks of a pack in a few products. A chunk's number in
the chain of chunks before it, its prompt's included, is its step: each step is one batch of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from megadpo.data.batches.pack import Segment
from megadpo.parallel import send

CHUNK = 64
"""Tokens of a chunk: flash-linear-attention's number, too."""


@dataclass(frozen=True)
class DeltaPlan:
    """What depends on a pack's segments alone. T tokens, N chunks of C places each."""

    before: tuple[torch.Tensor, ...]
    """[T] int64 each: the token that comes 1, 2, ... tokens before in its own text; T where there is none."""
    tokens: torch.Tensor
    """[N * C] int64: the token at each place of each chunk; T where there is none."""
    places: torch.Tensor
    """[T] int64: the place of each token."""
    steps: tuple[int, ...]
    """Chunks of each step. Chunks stand in the order of their steps."""
    origins: tuple[torch.Tensor, ...]
    """[n] int64, of each step but the first: each chunk's predecessor, by its number in the step before."""
    chunk: int
    """C."""


def plan_delta(segments: Sequence[Segment], device: torch.device, back: int, chunk: int = CHUNK) -> DeltaPlan:
    """segments: of a whole run, each behind those whose keys it sees. back: how many tokens before a token to list."""
    total = segments[-1].query_end
    follows = [_last_before(segment) for segment in segments]
    forks = {token + 1 for token in follows if token is not None}
    before = np.arange(-1, total)
    before[0] = before[-1] = total  # and before no token is none
    steps: list[list[tuple[int, int]]] = []
    origins: list[list[int]] = []
    ends: dict[int, tuple[int, int]] = {}  # where a chunk ends -> its step, its number there
    for segment, token in zip(segments, follows, strict=True):
        before[segment.query_start] = total if token is None else token
        step, origin = (-1, -1) if token is None else ends[token + 1]
        start = segment.query_start
        while start < segment.query_end:
            end = next((one for one in range(start + 1, start + chunk) if one in forks), start + chunk)
            end, step = min(end, segment.query_end), step + 1
            if step == len(steps):
                steps.append([])
                origins.append([])
            steps[step].append((start, end))
            origins[step].append(origin)
            origin = len(steps[step]) - 1
            ends[end] = step, origin
            start = end
    chunks = [one for step_chunks in steps for one in step_chunks]
    tokens = np.full((len(chunks), chunk), total)
    places = np.empty(total, dtype=np.int64)
    for number, (start, end) in enumerate(chunks):
        tokens[number, : end - start] = np.arange(start, end)
        places[start:end] = number * chunk + np.arange(end - start)
    earlier = [before]
    for _ in range(back - 1):
        earlier.append(before[earlier[-1]])

    def sent(numbers: np.ndarray) -> torch.Tensor:
        return send(torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64)), device)

    sizes = [len(step_chunks) for step_chunks in steps]
    return DeltaPlan(
        before=tuple(sent(one[:total]) for one in earlier[:back]),
        tokens=sent(tokens.reshape(-1)),
        places=sent(places),
        steps=tuple(sizes),
        origins=sent(np.concatenate([[], *origins[1:]])).split(sizes[1:]),
        chunk=chunk,
    )


def _last_before(segment: Segment) -> int | None:
    """The last token that a segment's first query sees besides itself."""
    left, last = segment.key_tokens - segment.query_tokens, None
    for start, end in segment.keys:
        if left > 0:
            last = min(end, start + left) - 1
        left -= end - start
    return last


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
    plan: DeltaPlan,
) -> torch.Tensor:
    """q and k [T, K, D], v [T, K, R, E], log_decay and strength [T, K, R] -> o [T, K, R, E] in v's dtype.

    K key heads, each with R value heads. Queries and keys are divided by their length here, and queries by sqrt(D) too.
    Computed in float32 (float64 for float64). Only the arguments are kept for the backward pass, which computes all chunks
    again. No collectives."""
    out: torch.Tensor = _Rule.apply(plan, q, k, v, log_decay, strength)
    return out


class _Rule(torch.autograd.Function):
    """Between forward and backward a chunk's matrices would be ten times as large as what they are made of."""

    @staticmethod
    def forward(ctx, plan, *inputs):  # type: ignore[no-untyped-def]
        ctx.plan = plan
        ctx.save_for_backward(*inputs)
        return _in_chunks(plan, *inputs)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        with torch.enable_grad():
            inputs = [one.detach().requires_grad_() for one in ctx.saved_tensors]
            out = _in_chunks(ctx.plan, *inputs)
        return None, *torch.autograd.grad(out, inputs, grad)


def _in_chunks(
    plan: DeltaPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    strength: torch.Tensor,
) -> torch.Tensor:
    """The module's formulas, for chunks [N, K, R, C, ...]; what is of key heads alone has 1 for R."""
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)

    def chunked(x: torch.Tensor) -> torch.Tensor:
        """[T, heads .., d] -> [N, heads .., C, d], zero where there is no token."""
        x = F.pad(x.to(wide), (0, 0) * (x.dim() - 1) + (0, 1)).index_select(0, plan.tokens)
        return x.unflatten(0, (-1, plan.chunk)).movedim(1, -2)

    q = chunked(_unit(q.to(wide)) * q.shape[-1] ** -0.5).unsqueeze(2)
    k = chunked(_unit(k.to(wide))).unsqueeze(2)
    v, b = chunked(v), chunked(strength[..., None])
    g = chunked(log_decay[..., None]).cumsum(dim=-2)
    later = torch.ones(plan.chunk, plan.chunk, dtype=torch.bool, device=v.device).triu(1)
    decay = (g - g.mT).masked_fill(later, float("-inf")).exp()
    # The solver takes the diagonal as ones, and nothing above it
    found = torch.linalg.solve_triangular(
        b * decay * (k @ k.mT), torch.cat((b * v, b * g.exp() * k), dim=-1), upper=False, unitriangular=True
    )
    new, read = found.split((v.shape[-1], k.shape[-1]), dim=-1)
    last = g[..., -1:, :]
    written, kept = (last - g).exp() * k, last.exp()
    state = v.new_zeros(plan.steps[0], *v.shape[1:3], k.shape[-1], v.shape[-1])
    states, values, done = [], [], 0
    for step, count in enumerate(plan.steps):
        if step:
            state = _Follow.apply(state, plan.origins[step - 1])
        chunks = slice(done, done + count)
        states.append(state)
        values.append(new[chunks] - read[chunks] @ state)
        state = kept[chunks] * state + written[chunks].mT @ values[-1]
        done += count
    out = (g.exp() * q) @ torch.cat(states) + (decay * (q @ k.mT)) @ torch.cat(values)
    return out.movedim(-2, 1).flatten(0, 1).index_select(0, plan.places).to(dtype)


class _Follow(torch.autograd.Function):
    """states [n, ...] and the predecessor of each chunk [m] -> the state that each chunk starts from [m, ...]."""

    @staticmethod
    def forward(ctx, states, origins):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(origins)
        ctx.shape = states.shape
        return states.index_select(0, origins)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (origins,) = ctx.saved_tensors
        return _add_rows(grad.new_zeros(ctx.shape), origins, grad), None


def _add_rows(sums: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Adds rows [n, ...] to the rows `index` [n] of `sums`, in place, in a fixed order: a resumed run repeats each bit. On a
    GPU index_add_ has no such order; on a CPU index_put_ has none."""
    return sums.index_put_((index,), rows, accumulate=True) if sums.is_cuda else sums.index_add_(0, index, rows)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """x [.., D] of length 1, but for 1e-6 under the root."""
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def causal_convolution(x: torch.Tensor, weight: torch.Tensor, plan: DeltaPlan) -> torch.Tensor:
    """x [T, channels], weight [channels, W], its last column the own token's -> the same shape and dtype as x.

    Each channel is a sum over the last W tokens of the token's own text, zero before its first one; in float32 (float64 for
    float64). Only the arguments are kept for the backward pass. No collectives."""
    out: torch.Tensor = _Convolution.apply(x, weight, plan.before)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, before):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.before = before
        wide = torch.promote_types(x.dtype, torch.float32)
        source, taps = F.pad(x.to(wide), (0, 0, 0, 1)), weight.to(wide).flip(-1).unbind(-1)
        out = source[:-1] * taps[0]
        for tap, index in zip(taps[1:], before, strict=True):
            out.addcmul_(source.index_select(0, index), tap)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        grad, source = grad.to(wide), F.pad(x.to(wide), (0, 0, 0, 1))
        taps = weight.to(wide).flip(-1).unbind(-1)
        d_source, d_taps = F.pad(grad * taps[0], (0, 0, 0, 1)), [(grad * source[:-1]).sum(0)]
        for tap, index in zip(taps[1:], ctx.before, strict=True):
            _add_rows(d_source, index, grad * tap)
            d_taps.append((grad * source.index_select(0, index)).sum(0))
        return d_source[:-1].to(x.dtype), torch.stack(d_taps, dim=-1).flip(-1).to(weight.dtype), None
