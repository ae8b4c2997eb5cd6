"""The gated delta rule in chunks against the plain recurrence, and the convolution against torch's, text by text, in
float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megadpo.data.batches.pack import Segment, pack_pairs
from megadpo.model.delta_rule import causal_convolution, gated_delta_rule, plan_delta
from tests.model.kernels.test_kernels import random_pairs

K, R, D, E = 2, 3, 5, 4
CPU = torch.device("cpu")
PAIRS = random_pairs([(9, 6, 4), (1, 1, 2), (2, 14, 7), (11, 5, 8)], vocab=64)
PACKS = {
    "shared prompts": pack_pairs(PAIRS, share_prompt=True, pad_to_multiple=8, pad_token_id=0).segments,
    "prompts repeated": pack_pairs(PAIRS, share_prompt=False, pad_to_multiple=8, pad_token_id=0).segments,
    # prefixes of several levels; the last but one goes on from the middle of the first
    "a tree": (
        Segment(0, 10, ((0, 10),)),
        Segment(10, 13, ((0, 10), (10, 13))),
        Segment(13, 22, ((0, 13), (13, 22))),
        Segment(22, 23, ((0, 13), (22, 23))),
        Segment(23, 30, ((0, 6), (23, 30))),
        Segment(30, 31, ((30, 31),)),
    ),
}


def texts(segments):
    """Of each segment the tokens that its last query sees, and how many of these are its own."""
    for one in segments:
        yield torch.cat([torch.arange(start, end) for start, end in one.keys]), one.query_tokens


def recurrence(q, k, v, log_decay, strength):
    """One text, token by token: the first formula of megadpo/model/delta_rule.py."""
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    state, outputs = torch.zeros(K, R, D, E, dtype=v.dtype), []
    for t in range(len(v)):
        key, query = k[t, :, None, :, None], q[t, :, None, :, None] * D**-0.5
        state = state * log_decay[t, ..., None, None].exp()
        new = strength[t, ..., None] * (v[t] - (state * key).sum(-2))
        state = state + key * new[..., None, :]
        outputs.append((state * query).sum(-2))
    return torch.stack(outputs)


def by_texts(segments, function, *inputs):
    return torch.cat([function(*(x[index] for x in inputs))[-own:] for index, own in texts(segments)])


def equal_with_gradients(got, want, inputs):
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((want * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("pack", PACKS)
def test_chunks_are_the_recurrence(pack, chunk):
    segments = PACKS[pack]
    total = segments[-1].query_end
    q, k = random(total, K, D, seed=2), random(total, K, D, seed=3)
    v, strength = random(total, K, R, E, seed=4), random(total, K, R, seed=5).sigmoid()
    log_decay = -3 * random(total, K, R, seed=6).exp()  # from almost nothing forgotten to almost all
    log_decay[::3] *= 1e-2
    inputs = [x.requires_grad_() for x in (q, k, v, log_decay, strength)]
    got = gated_delta_rule(*inputs, plan_delta(segments, CPU, back=3, chunk=chunk))
    equal_with_gradients(got, by_texts(segments, recurrence, *inputs), inputs)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("pack", PACKS)
def test_the_convolution_is_torchs(pack, width):
    segments, channels = PACKS[pack], 3
    x = random(segments[-1].query_end, channels, seed=7).requires_grad_()
    weight = random(channels, width, seed=8).requires_grad_()

    def one_text(x):
        padded = F.pad(x.T, (width - 1, 0))
        return F.conv1d(padded[None], weight[:, None], groups=channels)[0].T

    got = causal_convolution(x, weight, plan_delta(segments, CPU, back=width - 1))
    equal_with_gradients(got, by_texts(segments, one_text, x), (x, weight))


def test_a_step_is_one_batch_of_chunks():
    """Two prompts of 10 and 3 tokens, each with answers: 4 tokens a chunk."""
    pairs = random_pairs([(10, 5, 2), (3, 1, 9)], vocab=64)
    segments = pack_pairs(pairs, share_prompt=True, pad_to_multiple=1, pad_token_id=0).segments
    plan = plan_delta(segments, CPU, back=1, chunk=4)
    # 10: three chunks, then 5 and 2: two and one; 3: one chunk, then 1 and 9: one and three
    assert plan.steps == (2, 3, 2, 3, 1)
    assert [one.tolist() for one in plan.origins] == [[0, 1, 1], [0, 2], [0, 0, 1], [0]]


@pytest.mark.gpu
def test_a_gpu_repeats_each_bit_of_the_gradients():
    """Eight answers go on from one prompt: their gradients meet in its last state and in its last tokens."""
    starts = range(130, 130 + 8 * 70, 70)
    segments = (Segment(0, 130, ((0, 130),)), *(Segment(at, at + 70, ((0, 130), (at, at + 70))) for at in starts))
    plan, total = plan_delta(segments, torch.device("cuda"), back=3), segments[-1].query_end
    sizes = [(K, 64), (K, 64), (K, R, 64), (K, R), (K, R), (512,)]
    inputs = [torch.randn(total, *size, device="cuda", requires_grad=True) for size in sizes]
    inputs.append(torch.randn(512, 4, device="cuda", requires_grad=True))

    def gradients():
        q, k, v, decay, strength, x, weight = inputs
        out = gated_delta_rule(q, k, v, -decay.exp(), strength.sigmoid(), plan)
        return torch.autograd.grad(out.square().sum() + causal_convolution(x, weight, plan).square().sum(), inputs)

    first = gradients()
    for _ in range(20):
        assert all(map(torch.equal, gradients(), first))
