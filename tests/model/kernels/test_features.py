"""What a model's attention may ask of a kernel besides causal scores: windows, sinks, a soft-cap, values of another width, a
scale. Each against the formula written out in float64, alone and together."""

from __future__ import annotations

import math

import pytest
import torch

from megadpo.config.known import Machine
from megadpo.config.variants import ATTENTION_KERNELS
from megadpo.data.batches.cut import context_part
from megadpo.data.batches.pack import Segment, pack_pairs
from megadpo.families import parse_architecture
from megadpo.model.kernels import AttentionKernel, by_segment
from megadpo.model.kernels.cpu import CpuKernel
from megadpo.model.kernels.sdpa import SdpaKernel
from megadpo.model.kernels.varlen import VarlenKernel
from tests.model.kernels.test_kernels import SHARED, known_of, pack, random_pairs, reference_attention
from tests.plan.cases import SMALL

CPU = torch.device("cpu")
CASES = {
    "window": {"window": 4},
    "window of one": {"window": 1},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.5},
    "narrow values": {"value_width": 5},
    "wide values": {"value_width": 11},
    "scale": {"scale": 0.7},
    "all": {"window": 5, "sinks": True, "softcap": 1.5, "value_width": 5, "scale": 0.7},
    "all but softcap": {"window": 5, "sinks": True, "value_width": 11, "scale": 0.7},
}


def computes(kernel, case):
    """Whether the kernel says so."""
    return (set(CASES[case]) & set(kernel.FEATURES)) <= set(kernel.computes)


def inputs(tokens, value_width=8, sinks=False, heads=4, groups=2, dim=8, dtype=torch.float64):
    """Leaves q, k, v (and sinks), and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, heads, dim), (tokens, groups, dim), (tokens, groups, value_width)]
    leaves = [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]
    if sinks:
        leaves.append(torch.randn(heads, dtype=dtype, generator=generator))
    upstream = torch.randn(tokens, heads, value_width, dtype=dtype, generator=generator)
    return [x.requires_grad_() for x in leaves], upstream


def split_case(case):
    """(what the tensors are like, what `attend` is asked, the window)."""
    asked = dict(CASES[case])
    window = asked.pop("window", None)
    shapes = {name: asked.pop(name) for name in ("value_width", "sinks") if name in asked}
    return shapes, asked, window


def call(kernel, leaves, segments, window, asked):
    q, k, v, *sinks = leaves
    plan = kernel.plan(segments, CPU, q.dtype, window)
    return kernel.attend(q, *kernel.prepare(k, v, plan), plan, sinks=sinks[0] if sinks else None, **asked)


def wanted(leaves, segments, window, asked):
    q, k, v, *sinks = leaves
    return reference_attention(q, k, v, segments, window=window, sinks=sinks[0] if sinks else None, **asked)


class FlashStandIn:
    """torch's flash attention of CUDA, forward and backward, as operations of the CPU: what they say they do, written out
    with matrix products. Backward takes the softmax from the log-sum-exp, and the sum of gradient times output from the
    output, as flash attention does."""

    def __init__(self):
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_flash_attention_forward", self.forward, "CPU")
        self.library.impl("_flash_attention_backward", self.backward, "CPU")

    @staticmethod
    def segments(q, k, q_ends, k_ends, left, right, scale):
        assert right == 0
        for s in range(len(q_ends) - 1):
            rows, keys = slice(int(q_ends[s]), int(q_ends[s + 1])), slice(int(k_ends[s]), int(k_ends[s + 1]))
            n, m = rows.stop - rows.start, keys.stop - keys.start
            seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            seen = seen if left < 0 else seen.triu(m - n - left)
            repeated = k[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = torch.einsum("nhd,mhd->hnm", q[rows], repeated) * scale
            yield rows, keys, scores.masked_fill(~seen, -torch.inf), repeated

    @classmethod
    def forward(cls, q, k, v, q_ends, k_ends, most_q, most_k, dropout, causal, debug, **options):
        left, right, scale = (options.pop(name, None) for name in ("window_size_left", "window_size_right", "scale"))
        assert not any(options.values()) and q.shape[2] == k.shape[2] == v.shape[2] and causal == (left == -1)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        out, log_sum = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for rows, keys, scores, _ in cls.segments(q, k, q_ends, k_ends, left, right, scale):
            assert scores.shape[1] <= most_q and scores.shape[2] <= most_k
            log_sum[:, rows] = scores.logsumexp(-1)
            repeated = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
            out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), repeated)
        return out, log_sum, *(torch.empty(0) for _ in range(3))

    @classmethod
    def backward(
        cls, grad, q, k, v, out, log_sum, q_ends, k_ends, most_q, most_k, dropout, causal, *random, scale=None, **window
    ):
        left, right = window["window_size_left"], window["window_size_right"]
        assert causal == (left == -1) and grad.shape == q.shape == out.shape
        scale = q.shape[2] ** -0.5 if scale is None else scale
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        heads = q.shape[1] // k.shape[1]
        for rows, keys, scores, repeated in cls.segments(q, k, q_ends, k_ends, left, right, scale):
            weights = (scores - log_sum[:, rows, None]).exp()
            along = (grad[rows] * out[rows]).sum(-1).T[..., None]
            values = v[keys].repeat_interleave(heads, 1)
            d_scores = weights * (torch.einsum("nhd,mhd->hnm", grad[rows], values) - along) * scale
            d_q[rows] = torch.einsum("hnm,mhd->nhd", d_scores, repeated)
            d_k[keys] += torch.einsum("hnm,nhd->mhd", d_scores, q[rows]).unflatten(1, (-1, heads)).sum(2)
            d_v[keys] += torch.einsum("hnm,nhd->mhd", weights, grad[rows]).unflatten(1, (-1, heads)).sum(2)
        return d_q, d_k, d_v


@pytest.fixture(params=["cpu", "sdpa", "varlen"])
def kernel(request, monkeypatch):
    """Small segments go the way of long ones: some rows at a time, and some scores."""
    monkeypatch.setattr(by_segment, "FEWEST_ROWS", 3)
    monkeypatch.setattr(by_segment, "MOST_SCORES", 4 * 5 * 2)
    stand_in = FlashStandIn() if request.param == "varlen" else None
    yield {"cpu": CpuKernel, "sdpa": SdpaKernel, "varlen": VarlenKernel}[request.param]()
    if stand_in is not None:
        stand_in.library._destroy()


@pytest.mark.parametrize("case", CASES)
@SHARED
def test_it_is_what_is_written_out(kernel, share, case):
    if not computes(kernel, case):
        pytest.skip("refused")
    shapes, asked, window = split_case(case)
    batch = pack(share)
    leaves, upstream = inputs(batch.tokens.numel(), **shapes)
    got, want = (f(leaves, batch.segments, window, asked) for f in (lambda *a: call(kernel, *a), wanted))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for mine, expected in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", ["window", "sinks", "all", "all but softcap"])
@SHARED
@pytest.mark.parametrize("size", [2, 4])
def test_parts_over_gathered_keys_too(kernel, size, share, case):
    """Context parallelism: each part's queries over the keys of all, in the order of the all-gather."""
    if not computes(kernel, case):
        pytest.skip("refused")
    shapes, asked, window = split_case(case)
    batch = pack(share, 12)
    parts = [context_part(batch, rank, size) for rank in range(size)]
    order = torch.cat([part.run_index for part in parts])
    leaves, upstream = inputs(batch.tokens.numel(), **shapes)
    q, k, v, *sinks = leaves
    gathered = torch.cat((k, v), -1)[order].split((k.shape[2], v.shape[2]), -1)
    outs = [call(kernel, [q[part.run_index], *gathered, *sinks], part.segments, window, asked) for part in parts]
    want = wanted(leaves, batch.segments, window, asked)
    torch.testing.assert_close(torch.cat(outs), want[order], rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(torch.cat(outs), leaves, upstream[order])
    for mine, expected in zip(got, torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def by_matrices(q, k, v, segments, *, window, sinks=None, softcap=None, scale=None):
    """The same as `reference_attention`, a segment at a time: for sizes at which that one takes minutes."""
    rows, heads = [], q.shape[1] // k.shape[1]
    for segment in segments:
        index = torch.cat([torch.arange(a, b) for a, b in segment.keys])
        n, m = segment.query_tokens, segment.key_tokens
        keys, values = (x[index].repeat_interleave(heads, 1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q[segment.query_start : segment.query_end], keys)
        scores = scores * (q.shape[2] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        place = torch.arange(m - n, m)[:, None] - torch.arange(m)
        scores = scores.masked_fill((place < 0) | (place >= window), -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, n, 1)], -1)
        rows.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1)[..., :m], values))
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("kernel", "dim", "value_width", "window", "asked"),
    [
        (CpuKernel(), 128, 128, 1024, {"sinks": True}),  # rows at a time with all of a block of keys out of reach
        (CpuKernel(), 192, 128, 512, {"scale": 0.1}),
        (SdpaKernel(), 256, 256, 1024, {"softcap": 5.0, "scale": 0.1}),
        (SdpaKernel(), 128, 128, 128, {"sinks": True}),
        (SdpaKernel(), 192, 128, 700, {}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_at_the_width_of_real_models_in_float32(kernel, dim, value_width, window, asked):
    segments = (
        Segment(0, 1500, ((0, 1500),)),
        Segment(1500, 2100, ((0, 1500), (1500, 2100))),
        Segment(2100, 2150, ((0, 1500), (2100, 2150))),
    )
    asked = dict(asked)
    leaves, upstream = inputs(2150, value_width, asked.pop("sinks", False), 2, 1, dim, torch.float32)
    out = call(kernel, leaves, segments, window, asked)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    sinks = {"sinks": wide[3]} if len(wide) > 3 else {}
    want = by_matrices(*wide[:3], segments, window=window, **sinks, **asked)
    got = [out, *torch.autograd.grad(out, leaves, upstream)]
    for mine, expected in zip(got, [want, *torch.autograd.grad(want, wide, upstream.double())], strict=True):
        assert (mine.double() - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kernel", [CpuKernel(), SdpaKernel()], ids=lambda kernel: kernel.name)
def test_gradients_of_sinks_are_summed_in_float32(kernel):
    """Over 1024 queries, in bfloat16: its own sum would stand still after some hundred."""
    segments = (Segment(0, 1024, ((0, 1024),)),)
    (q, k, v, sinks), upstream = inputs(1024, sinks=True, dtype=torch.bfloat16)
    upstream = torch.ones_like(upstream)
    v = torch.ones_like(v).requires_grad_()  # every query's share of a sink's gradient has one sign
    out = call(kernel, [q, k, v, sinks], segments, 64, {})
    (got,) = torch.autograd.grad(out, sinks, upstream)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    want_out = by_matrices(*wide[:3], segments, window=64, sinks=wide[3])
    (want,) = torch.autograd.grad(want_out, wide[3], upstream.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=0)


def test_rows_of_a_segment_see_what_they_saw_in_it():
    segment = Segment(10, 16, ((0, 4), (20, 22), (10, 16)))  # keys 0..11, queries are 6..11
    assert segment.rows(0, 6) == segment
    assert segment.rows(1, 3) == Segment(11, 13, ((0, 4), (20, 22), (10, 13)))
    assert segment.rows(1, 3, window=3) == Segment(11, 13, ((21, 22), (10, 13)))
    assert segment.rows(0, 6, window=1) == Segment(10, 16, ((10, 16),))
    assert segment.rows(0, 1, window=6) == Segment(10, 11, ((1, 4), (20, 22), (10, 11)))
    assert segment.rows(0, 6, window=100) == segment


@pytest.mark.parametrize("window", [None, 1000])
def test_a_window_that_no_query_notices_changes_nothing(window):
    """The same calls, so the same bits."""
    batch = pack_pairs(random_pairs(), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    for kernel in (CpuKernel(), SdpaKernel()):
        plan = kernel.plan(batch.segments, CPU, torch.float32, window)
        assert len(plan if isinstance(plan, tuple) else plan.segments) == len(batch.segments)
    assert VarlenKernel().plan(batch.segments, CPU, torch.bfloat16, window).window_size == (-1, 0)


def test_keys_out_of_reach_are_not_gathered():
    """Each answer gathers the end of its prompt."""
    segments = (Segment(0, 50, ((0, 50),)), Segment(50, 60, ((0, 60),)), Segment(60, 64, ((0, 50), (60, 64))))
    plan = VarlenKernel().plan(segments, CPU, torch.bfloat16, 8)
    assert plan.cu_seqlens_k.diff().tolist() == [50, 17, 11] and plan.key_tokens == 78
    assert plan.key_index.tolist()[50:] == [*range(43, 60), *range(43, 50), *range(60, 64)]


def test_masks_stay_small_beside_the_segment():
    segments = (Segment(0, 20000, ((0, 20000),)),)
    plan = CpuKernel().plan(segments, CPU, torch.float32, 1024)
    masks = {piece.mask.data_ptr(): piece.mask for piece in plan if piece.mask is not None}
    assert sum(mask.numel() for mask in masks.values()) <= 4 * 512 * (512 + 1024)
    assert math.isclose(len(plan), 20000 / 512, abs_tol=1)


def test_every_kernel_declares_what_is_known():
    for kernel in ATTENTION_KERNELS:
        assert set(kernel.computes) <= set(kernel.FEATURES)


def with_attention(**changes):
    arch = parse_architecture({**SMALL, "head_dim": 16})
    return arch.with_attention(value_dim=changes.pop("value_dim", changes.get("head_dim", 16)), **changes)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("varlen", {"logit_softcap": 50.0}, "a soft-cap on scores, which LlamaForCausalLM has: sdpa"),
        ("cpu", {"logit_softcap": 50.0}, "a soft-cap on scores"),
        ("transformer_engine", {"sinks": True}, "attention sinks, which LlamaForCausalLM has: sdpa or varlen"),
        ("transformer_engine", {"sinks": True, "logit_softcap": 5.0}, "attention sinks and a soft-cap on scores"),
        ("varlen", {"head_dim": 264}, "heads of 264 channels, which LlamaForCausalLM has: sdpa"),
        ("transformer_engine", {"value_dim": 264}, "heads of 264 channels"),
        ("windowless", {"window": 511}, "windows of keys"),
        ("windowless", {"value_dim": 8}, "values of another width than keys"),
    ],
)
def test_a_kernel_refuses_what_it_does_not_compute(name, changes, why, windowless):
    known = known_of(name, None, device="cpu" if name == "cpu" else "cuda", arch=with_attention(**changes))
    [problem] = ATTENTION_KERNELS.problems(known)
    assert problem.where == "policy.attention_kernel" and why in problem.expected and "sdpa" in problem.fix


@pytest.fixture
def windowless():
    @ATTENTION_KERNELS.add("windowless")
    class Windowless(AttentionKernel):
        name = "windowless"

    yield
    ATTENTION_KERNELS.remove("windowless")


@pytest.mark.parametrize("changes", [{"window": 512}, {"scale": 0.1}, {"head_dim": 256}])
def test_a_window_no_shorter_than_the_longest_pair_asks_for_nothing(changes, windowless):
    assert list(ATTENTION_KERNELS.problems(known_of("windowless", None, arch=with_attention(**changes)))) == []


@pytest.mark.parametrize(
    ("device", "changes", "name"),
    [
        ("cpu", {"window": 4, "sinks": True, "value_dim": 8}, "cpu"),
        ("cpu", {"logit_softcap": 50.0}, "sdpa"),
        ("cuda", {"window": 4, "sinks": True}, "varlen"),
        ("cuda", {"logit_softcap": 50.0}, "sdpa"),
        ("cuda", {"head_dim": 288}, "sdpa"),
    ],
)
def test_auto_takes_a_kernel_that_computes_the_model(device, changes, name):
    known = known_of("auto", Machine(device=device), arch=with_attention(**changes))
    assert ATTENTION_KERNELS.choose(known).name == name
