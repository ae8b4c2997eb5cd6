"""Attention over segments against the written-out softmax in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megadpo.config.known import Known, Machine
from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.config.variants import ATTENTION_KERNELS
from megadpo.data.batches.cut import context_part
from megadpo.data.batches.groups import PairGroups
from megadpo.data.batches.pack import Segment, pack_pairs
from megadpo.data.pairs import FlatPairs, TokenizedPair
from megadpo.model.kernels import RaggedKernel, flash3
from megadpo.model.kernels.cpu import CpuKernel
from megadpo.model.kernels.sdpa import SdpaKernel
from megadpo.model.kernels.varlen import _has_enable_gqa
from tests.data.builders import pairs_that_begin_alike

LENGTHS = [(5, 3, 4), (1, 1, 2), (9, 7, 1)]
PART = (  # what one context-parallel rank holds: queries of 4 segments over keys gathered from two ranks, [0, 640)
    Segment(0, 100, ((0, 100),)),
    Segment(100, 180, ((0, 100), (320, 400))),
    Segment(180, 200, ((0, 100), (320, 400), (400, 540), (100, 120))),
    Segment(200, 320, ((120, 320), (540, 640))),
)


def random_pairs(lengths=LENGTHS, vocab=50, seed=0):
    rng = np.random.default_rng(seed)
    return [TokenizedPair(i, *(rng.integers(0, vocab, n).astype(np.int32) for n in ns)) for i, ns in enumerate(lengths)]


def pack(share, multiple=8):
    """share: "prompts", nothing (""), or what answers "begin" with."""
    pairs = pairs_that_begin_alike() if share == "begin" else random_pairs()
    groups = PairGroups.of(FlatPairs.of(pairs)) if share == "begin" else None
    return pack_pairs(pairs, share_prompt=bool(share), pad_to_multiple=multiple, pad_token_id=0, groups=groups)


SHARED = pytest.mark.parametrize("share", ["prompts", "", "begin"])


def reference_attention(q, k, v, segments, *, window=None, scale=None, softcap=None, sinks=None):
    """What megadpo/model/kernels says, segment by segment and query by query; q [T, H, D], k [T, G, D], v [T, G, E]."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    rows = []
    for segment in segments:
        index = torch.cat([torch.arange(a, b) for a, b in segment.keys])
        for i in range(segment.query_start, segment.query_end):
            seen = index[: len(index) - (segment.query_end - 1 - i)][-(window or 0) :]
            heads = []
            for h in range(q.shape[1]):
                scores = (k[seen, h // group] @ q[i, h]) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1]])
                heads.append(scores.softmax(0)[: len(seen)] @ v[seen, h // group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@SHARED
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("kernel", [SdpaKernel(), CpuKernel()], ids=lambda kernel: kernel.name)
def test_kernels_equal_written_out_attention(kernel, share, heads, groups):
    batch = pack(share)
    generator = torch.Generator().manual_seed(0)
    tokens = batch.tokens.numel()
    q = torch.randn(tokens, heads, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(tokens, groups, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)
    )
    upstream = torch.randn(tokens, heads, 8, dtype=torch.float64, generator=generator)
    out = kernel.attend(q, k, v, kernel.plan(batch.segments, torch.device("cpu"), torch.float64))
    want = reference_attention(q, k, v, batch.segments)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@SHARED
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kernel", [SdpaKernel(), CpuKernel()], ids=lambda kernel: kernel.name)
def test_parts_over_gathered_keys_equal_written_out_attention(kernel, size, share):
    """Context parallelism: each part's queries over all keys, in the order of the all-gather, keys and values in one
    tensor. The gradients of keys add up over the parts."""
    batch = pack(share, 12)
    parts = [context_part(batch, rank, size) for rank in range(size)]
    order = torch.cat([part.run_index for part in parts])
    generator = torch.Generator().manual_seed(0)
    tokens = batch.tokens.numel()
    q, upstream = (torch.randn(tokens, 4, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    both = torch.randn(tokens, 2, 2, 8, dtype=torch.float64, generator=generator)
    q, both = q.requires_grad_(), both.requires_grad_()
    want = reference_attention(q, both[:, 0], both[:, 1], batch.segments)
    outs = []
    for part in parts:
        gathered = both[order]
        plan = kernel.plan(part.segments, torch.device("cpu"), torch.float64)
        outs.append(kernel.attend(q[part.run_index], gathered[:, 0], gathered[:, 1], plan))
        torch.testing.assert_close(outs[-1], want[part.run_index], rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(torch.cat(outs), (q, both), upstream[order])
    for mine, expected in zip(got, torch.autograd.grad(want, (q, both), upstream), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


def ragged_plan(segments):
    return RaggedKernel().plan(segments, torch.device("cpu"), torch.bfloat16)


def dense_from_ragged_plan(q, k, v, segments):
    """Attention by what the fused kernels are handed, which can't run here: cumulative lengths and gathered keys."""
    plan = ragged_plan(segments)
    keys, values = RaggedKernel().prepare(k, v, plan)
    assert len(keys) == len(values) == plan.cu_seqlens_k[-1] and len(q) == plan.cu_seqlens_q[-1]
    rows = []
    for s in range(len(segments)):
        qs = q[plan.cu_seqlens_q[s] : plan.cu_seqlens_q[s + 1]]
        ks, vs = (x[plan.cu_seqlens_k[s] : plan.cu_seqlens_k[s + 1]] for x in (keys, values))
        scores = torch.einsum("nhd,mhd->hnm", qs, ks) / 8**0.5
        seen = torch.ones(len(qs), len(ks), dtype=torch.bool).tril(len(ks) - len(qs))
        rows.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), vs))
        assert len(qs) <= plan.max_seqlen_q and len(ks) <= plan.max_seqlen_k
    return torch.cat(rows)


@SHARED
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ragged_plan_describes_the_same_attention(size, share):
    batch = pack(share)
    parts = [context_part(batch, rank, size) for rank in range(size)]
    order = torch.cat([part.run_index for part in parts])
    generator = torch.Generator().manual_seed(1)
    tokens = batch.tokens.numel()
    q, k, v = (torch.randn(tokens, 2, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    want = reference_attention(q, k, v, batch.segments)
    for part in parts:
        got = dense_from_ragged_plan(q[part.run_index], k[order], v[order], part.segments)
        torch.testing.assert_close(got, want[part.run_index], rtol=1e-12, atol=1e-12)


def test_a_part_whose_keys_are_the_first_of_all_gathers_nothing():
    """The first rank's short sequences, seen by nobody else: kernels still get no more keys than they were told of."""
    plan = ragged_plan((Segment(0, 2, ((0, 2),)), Segment(2, 3, ((2, 3),))))
    keys = torch.arange(6.0).view(6, 1, 1)
    assert plan.key_index is None
    assert [x.flatten().tolist() for x in RaggedKernel().prepare(keys, keys, plan)] == [[0.0, 1.0, 2.0]] * 2


def test_plain_packing_gathers_nothing():
    batch = pack_pairs(random_pairs(), share_prompt=False, pad_to_multiple=1, pad_token_id=0)
    assert ragged_plan(batch.segments).key_index is None
    assert ragged_plan((Segment(0, 2, ((0, 2),)), Segment(2, 3, ((0, 2), (2, 3))))).key_index is not None


GPU = Machine(device="cuda")
BARE_GPU = Machine(device="cuda", why_missing=lambda name: f"{name} is not installed")


def known_of(kernel, machine, precision="bfloat16", device="auto", arch=None):
    tokenizer = TokenizerConfig(name="m")
    policy = PolicyConfig(
        model_name="m",
        tokenizer=tokenizer,
        attention_kernel=kernel,
        precision=precision,
        device=device,
        max_total_sequence_length=512,
    )
    return Known(cfg=Config(policy=policy), machine=machine, arch=arch)


@pytest.mark.parametrize(
    ("machine", "precision", "name"),
    [
        (Machine(device="cpu"), "float32", "cpu"),
        (Machine(device="cpu"), "bfloat16", "cpu"),
        (GPU, "bfloat16", "varlen"),
        (GPU, "float32", "sdpa"),
        (BARE_GPU, "bfloat16", "varlen"),
    ],
)
def test_auto_is_the_first_that_can_run(machine, precision, name):
    assert ATTENTION_KERNELS.choose(known_of("auto", machine, precision)).name == name


@pytest.mark.parametrize(
    ("kernel", "machine", "options", "why"),
    [
        ("varlen", Machine(device="cpu"), {}, "auto, cpu or sdpa on the device cpu"),
        ("transformer_engine", Machine(device="cpu"), {}, "needs cuda"),
        ("cpu", GPU, {}, "needs cpu"),
        ("varlen", GPU, {"precision": "float32"}, "such as sdpa"),
        ("transformer_engine", BARE_GPU, {}, "transformer_engine is not installed"),
        ("flash3", Machine(device="cpu"), {}, "needs cuda"),
        ("flash3", GPU, {"precision": "float32"}, "such as sdpa"),
        ("flash3", BARE_GPU, {}, "flash_attn_interface is not installed"),
        (
            "flash3",
            Machine(device="cuda", compute_capability=(10, 0)),
            {},
            "needs compute capability 9.0, and this GPU has 10.0",
        ),
        ("varlen", None, {"device": "cpu"}, "on the device cpu"),
        ("cpu", None, {"device": "cuda"}, "on the device cuda"),
        ("transformer_engine", None, {"precision": "float32"}, "such as sdpa"),
    ],
)
def test_a_kernel_says_why_it_cannot_run(kernel, machine, options, why):
    """None: what the config alone tells."""
    known = known_of(kernel, machine, **options)
    [problem] = ATTENTION_KERNELS.problems(known)
    assert problem.where == "policy.attention_kernel" and why in problem.expected and "auto" in problem.fix
    with pytest.raises(ConfigError, match="policy.attention_kernel"):
        ATTENTION_KERNELS.choose(known)


def test_flash3_takes_torchs_place_for_it_when_it_first_plans(monkeypatch):
    from torch.nn import attention

    activated = []
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activated.append)
    kernel = ATTENTION_KERNELS.choose(known_of("flash3", Machine(device="cuda", compute_capability=(9, 0))))
    assert activated == [] and attention.list_flash_attention_impls().count("FA3") == 1
    for _ in range(2):
        kernel.plan(PART, torch.device("cpu"), torch.bfloat16)
    assert activated == ["FA3"]


@pytest.mark.parametrize("groups", [2, 8])
def test_varlen_keeps_the_keys_that_it_is_given(groups):
    """Not repeated for every query head, and the tensors themselves, by which context parallelism knows them. Shapes
    alone: torch has it without a GPU as far as its meta device."""
    kernel, meta = ATTENTION_KERNELS.configured("varlen", {}), torch.device("meta")
    plan = kernel.plan(PART, torch.device("cpu"), torch.bfloat16)
    plan = dataclasses.replace(plan, cu_seqlens_q=plan.cu_seqlens_q.to(meta), cu_seqlens_k=plan.cu_seqlens_k.to(meta))
    q, k, v = (
        torch.empty(shape, device=meta, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((320, 8, 64), (plan.key_tokens, groups, 64), (plan.key_tokens, groups, 64))
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = kernel.attend(q, k, v, plan)
    places = [tensor.untyped_storage()._cdata for tensor in kept]
    assert all(x.untyped_storage()._cdata in places for x in (q, k, v))
    assert [x.shape for x in torch.autograd.grad(out, (q, k, v), torch.empty_like(out))] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(("heads", "told"), [(2, True), (8, None)])
def test_varlen_asks_for_fewer_heads_of_keys_where_torch_has_enable_gqa(heads, told, monkeypatch):
    from torch.nn.attention import varlen

    kernel, given = ATTENTION_KERNELS.configured("varlen", {}), []
    plan = kernel.plan(PART, torch.device("cpu"), torch.bfloat16)

    def newer(q, k, v, *ends, window_size, enable_gqa=None):
        given.append((k.shape[1], window_size, enable_gqa))
        return q

    def older(q, k, v, *ends, window_size):  # torch 2.11
        given.append((k.shape[1], window_size))
        return q

    for function in (newer, older):
        _has_enable_gqa.cache_clear()
        monkeypatch.setattr(varlen, "varlen_attn", function)
        kernel.attend(torch.empty(320, 8, 64), *torch.empty(2, plan.key_tokens, heads, 64), plan)
    _has_enable_gqa.cache_clear()
    assert given == [(heads, (-1, 0), told), (heads, (-1, 0))]


FUSED = ["varlen", "transformer_engine", "flash3"]


@pytest.fixture(autouse=True)
def torchs_own_flash_attention_afterwards():
    yield
    if flash3._activate.cache_info().currsize:
        torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        flash3._activate.cache_clear()


def need(name):
    if name == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    if name == "flash3":
        pytest.importorskip("flash_attn_interface")
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("needs compute capability 9.0")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(8, 8, 64), (16, 4, 128)])
def test_fused_kernels_against_float64(name, share_prompt, heads, groups, dim):
    need(name)
    lengths = [(500, 60, 75), (130, 40, 52), (333, 210, 17)]
    batch = pack_pairs(random_pairs(lengths), share_prompt=share_prompt, pad_to_multiple=8, pad_token_id=0)
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch.tokens.numel(), groups, dim)
    q = torch.randn(shape[0], heads, dim, device=device, dtype=torch.bfloat16, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator, requires_grad=True)
        for _ in range(2)
    )
    upstream = torch.randn(q.shape, device=device, dtype=torch.bfloat16, generator=generator)
    kernel = ATTENTION_KERNELS.configured(name, {})
    plan = kernel.plan(batch.segments, device, torch.bfloat16)
    out = kernel.attend(q, *kernel.prepare(k, v, plan), plan)
    got = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    sdpa = SdpaKernel()  # held to the written-out attention above
    want_out = sdpa.attend(*wide, sdpa.plan(batch.segments, torch.device("cpu"), torch.float64))
    want = (want_out, *torch.autograd.grad(want_out, wide, upstream.cpu().double()))
    for a, b in zip(got, want, strict=True):
        error = (a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()
        assert error < 1e-2  # bfloat16 rounds at 4e-3


FUSED_CASES = [({"window": 100}, 128), ({"window": 100, "sinks": True, "scale": 0.1}, 128), ({"scale": 0.1}, 96)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("asked", "value_width"), FUSED_CASES)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_fused_kernels_with_what_models_ask_for(name, asked, value_width, share_prompt):
    need(name)
    asked, device, generator = dict(asked), torch.device("cuda"), torch.Generator("cuda").manual_seed(0)
    kernel = ATTENTION_KERNELS.configured(name, {})
    needed = {name for name in ("window", "sinks") if name in asked} | (
        {"value_width"} if value_width != 128 else set()
    )
    if not needed <= set(kernel.computes):
        pytest.skip("refused")
    lengths = [(500, 60, 75), (130, 40, 52), (333, 210, 17)]
    batch = pack_pairs(random_pairs(lengths), share_prompt=share_prompt, pad_to_multiple=8, pad_token_id=0)
    tokens, window, sinks = batch.tokens.numel(), asked.pop("window", None), asked.pop("sinks", False)
    shapes = [(tokens, 16, 128), (tokens, 4, 128), (tokens, 4, value_width), *([(16,)] if sinks else [])]
    leaves = [torch.randn(one, device=device, dtype=torch.bfloat16, generator=generator) for one in shapes]
    leaves = [x.requires_grad_() for x in leaves]
    upstream = torch.randn(tokens, 16, value_width, device=device, dtype=torch.bfloat16, generator=generator)

    def run(kernel, leaves, upstream):
        q, k, v, *sinks = leaves
        plan = kernel.plan(batch.segments, q.device, q.dtype, window)
        out = kernel.attend(q, *kernel.prepare(k, v, plan), plan, sinks=sinks[0] if sinks else None, **asked)
        return out, *torch.autograd.grad(out, leaves, upstream)

    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    want = run(SdpaKernel(), wide, upstream.cpu().double())  # held to the written-out attention in test_features.py
    for got, expected in zip(run(kernel, leaves, upstream), want, strict=True):
        error = (got.detach().cpu().double() - expected.detach()).norm() / expected.detach().norm()
        assert error < 1e-2  # bfloat16 rounds at 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_with_more_keys_than_queries(name):
    need(name)
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        x = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
        return x.requires_grad_()

    q, k, v = random(320, 8, 64), random(640, 2, 64), random(640, 2, 64)
    upstream = random(320, 8, 64).detach()
    kernel = ATTENTION_KERNELS.configured(name, {})
    out = kernel.attend(q, k, v, kernel.plan(PART, device, torch.bfloat16))
    got = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    want_out = reference_attention(*wide, PART)
    want = (want_out, *torch.autograd.grad(want_out, wide, upstream.cpu().double()))
    for a, b in zip(got, want, strict=True):
        assert (a.detach().cpu().double() - b.detach()).norm() / b.detach().norm() < 1e-2  # bfloat16 rounds at 4e-3
