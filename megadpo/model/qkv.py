"""One Triton kernel from the QKV projection to what attention reads, forward and backward.

The passes that it replaces each read and write all queries or keys: copying queries out of the projection, rotating
queries, rotating keys, gathering keys, gathering values; backward the same and joining three gradients, with atomic
additions where several segments see a key. In bytes per token of Llama-3.1-8B's layer, with keys gathered 1.2 times: 46
thousand forward and 62 backward, here 26 and 26.

Angles, products and sums are in float32, and each result is rounded once. Gradients of a key that several segments see
are added in a fixed order. With TRITON_INTERPRET=1 set before Triton is imported, the kernels run on a CPU, as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megadpo.model.kernels import RaggedPlan


@triton.jit
def _partner(channel, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Of each channel: the one that it is turned with, whose angle, and whether it is the first of the two."""
    if INTERLEAVED:
        first = channel % 2 == 0
        frequency = channel // 2
        partner = tl.where(first, channel + 1, channel - 1)
    else:
        first = channel < DIMS // 2
        frequency = tl.where(first, channel, channel - DIMS // 2)
        partner = tl.where(first, channel + DIMS // 2, channel - DIMS // 2)
    return tl.where(channel < DIMS, partner, channel), frequency, first


@triton.jit
def _angles(cos, sin, token, channel, frequency, first, direction, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Factors of each channel and of its partner, float32: 1 and 0 from channel DIMS on."""
    turns = channel < DIMS
    place = token * (DIMS // 2) + frequency
    c = tl.load(cos + place, mask=turns, other=1.0)
    s = tl.load(sin + place, mask=turns, other=0.0) * direction
    return c, tl.where(first, -s, s)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    mixed, cos, sin, key_index, query, key, value, tokens,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr,  # noqa: N803
    GATHERED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One program for each token's queries, then one for each row of keys and values. (Names are of one type in Triton, also
    over the two branches.)"""
    program = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    partner, frequency, first = _partner(channel, DIMS, INTERLEAVED)
    if program < tokens:
        head = tl.arange(0, BLOCK_H)
        q_inside = (head < G * R)[:, None] & (channel < D)[None, :]
        q_start = mixed + program * (G * (R + 2) * D) + ((head // R) * (R + 2) + head % R)[:, None] * D
        q_cos, q_sin = _angles(cos, sin, program, channel, frequency, first, 1.0, DIMS)
        q = tl.load(q_start + channel[None, :], mask=q_inside, other=0.0).to(tl.float32)
        q_other = tl.load(q_start + partner[None, :], mask=q_inside, other=0.0).to(tl.float32)
        q_turned = q * q_cos[None, :] + q_other * q_sin[None, :]
        q_place = program * (G * R * D) + head[:, None] * D + channel[None, :]
        tl.store(query + q_place, q_turned.to(query.dtype.element_ty), mask=q_inside)
    else:
        row = program - tokens
        token = row
        if GATHERED:
            token = tl.load(key_index + row)
        group = tl.arange(0, BLOCK_G)
        inside = (group < G)[:, None] & (channel < D)[None, :]
        start = mixed + token * (G * (R + 2) * D) + (group * (R + 2) + R)[:, None] * D
        k_cos, k_sin = _angles(cos, sin, token, channel, frequency, first, 1.0, DIMS)
        k = tl.load(start + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        k_other = tl.load(start + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        k_turned = k * k_cos[None, :] + k_other * k_sin[None, :]
        place = row * (G * D) + group[:, None] * D + channel[None, :]
        tl.store(key + place, k_turned.to(key.dtype.element_ty), mask=inside)
        tl.store(value + place, tl.load(start + D + channel[None, :], mask=inside, other=0.0), mask=inside)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    d_query, d_key, d_value, cos, sin, starts, copies, d_mixed,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, INTERLEAVED: tl.constexpr,  # noqa: N803
    GATHERED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """One program a token: its queries' gradients, and the sums of its key's and value's copies, turned back."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    partner, frequency, first = _partner(channel, DIMS, INTERLEAVED)
    c, s = _angles(cos, sin, token, channel, frequency, first, -1.0, DIMS)
    head = tl.arange(0, BLOCK_H)
    inside = (head < G * R)[:, None] & (channel < D)[None, :]
    row = d_query + token * (G * R * D) + head[:, None] * D
    x = tl.load(row + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    out = d_mixed + token * (G * (R + 2) * D)
    place = ((head // R) * (R + 2) + head % R)[:, None] * D + channel[None, :]
    tl.store(out + place, (x * c[None, :] + other * s[None, :]).to(d_mixed.dtype.element_ty), mask=inside)

    group = tl.arange(0, BLOCK_G)
    k_inside = (group < G)[:, None] & (channel < D)[None, :]
    keys = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    partners = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    values = tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32)
    begin, end = token, token + 1
    if GATHERED:
        begin, end = tl.load(starts + token), tl.load(starts + token + 1)
    for number in range(begin, end):
        copy = number
        if GATHERED:
            copy = tl.load(copies + number)
        k_row = copy * (G * D) + group[:, None] * D
        keys += tl.load(d_key + k_row + channel[None, :], mask=k_inside, other=0.0).to(tl.float32)
        partners += tl.load(d_key + k_row + partner[None, :], mask=k_inside, other=0.0).to(tl.float32)
        values += tl.load(d_value + k_row + channel[None, :], mask=k_inside, other=0.0).to(tl.float32)
    k_place = (group * (R + 2) + R)[:, None] * D + channel[None, :]
    turned_back = keys * c[None, :] + partners * s[None, :]
    tl.store(out + k_place, turned_back.to(d_mixed.dtype.element_ty), mask=k_inside)
    tl.store(out + k_place + D, values.to(d_mixed.dtype.element_ty), mask=k_inside)


def split_and_turn(
    mixed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    gathers: RaggedPlan | None,
    *,
    groups: int,
    width: int,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The QKV projection of T tokens -> queries [T, H, D], keys [K, G, D] and values [K, G, D].

    mixed: [T, (H + 2G) D], each group's heads, then its key, then its value, as megatron-core lays them out; contiguous.
    cos, sin: [T, dims/2] float32, for the first `dims` channels of each query and key. gathers: keys and values as its
    kernel's `prepare` gives them; None: one a token, K = T. `interleaved`: neighbouring channels are turned together, not
    halves. No collectives. The gradient of `mixed` has the dtype of those that come in.
    """
    gathers = gathers if gathers is not None and gathers.key_index is not None else None
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _Split.apply(
        mixed.contiguous(), cos, sin, gathers, groups, width, interleaved
    )
    return found


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, cos, sin, gathers, groups, width, interleaved):  # type: ignore[no-untyped-def]
        tokens, heads = mixed.shape[0], mixed.shape[1] // width - 2 * groups
        rows = tokens if gathers is None else gathers.key_tokens
        query = mixed.new_empty((tokens, heads, width))
        key, value = (mixed.new_empty((rows, groups, width)) for _ in range(2))
        ctx.sizes = _sizes(groups, heads, width, 2 * cos.shape[1], interleaved, gathers is not None)
        index = cos if gathers is None else gathers.key_index  # without one any pointer: it isn't read
        _forward[(tokens + rows,)](mixed, cos, sin, index, query, key, value, tokens, **ctx.sizes)
        ctx.save_for_backward(cos, sin)
        ctx.gathers = gathers
        return query, key, value

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        d_query, d_key, d_value = (grad.contiguous() for grad in grads)
        tokens, heads, width = d_query.shape
        d_mixed = d_query.new_empty((tokens, (heads + 2 * d_key.shape[1]) * width))
        places, starts = (cos, cos) if ctx.gathers is None else ctx.gathers.copies
        _backward[(tokens,)](d_query, d_key, d_value, cos, sin, starts, places, d_mixed, **ctx.sizes)
        return d_mixed, None, None, None, None, None, None


def _sizes(groups: int, heads: int, width: int, dims: int, interleaved: bool, gathered: bool) -> dict[str, int | bool]:
    blocks = [triton.next_power_of_2(count) for count in (heads, groups, width)]
    shape = {"G": groups, "R": heads // groups, "D": width, "DIMS": dims}
    shape |= dict(zip(("BLOCK_H", "BLOCK_G", "BLOCK_D"), blocks, strict=True))
    warps = 4 if blocks[0] * blocks[2] <= 4096 else 8
    return shape | {"INTERLEAVED": interleaved, "GATHERED": gathered, "num_warps": warps}
