"""Attention over keys gathered from context-parallel ranks: exact in both directions, and leaner with every rank."""

from __future__ import annotations

import ctypes
import gc
import itertools

import pytest
import torch

from megadpo.data.batches.cut import context_part
from megadpo.data.batches.pack import pack_pairs
from megadpo.model.kernels import RaggedKernel
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_model
from tests.model.kernels.test_kernels import random_pairs, reference_attention

HEADS, GROUPS, DIM = 4, 2, 8


def inputs(tokens):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, HEADS, DIM), (tokens, GROUPS, DIM), (tokens, GROUPS, DIM), (tokens, HEADS, DIM)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


class RaggedStandIn(RaggedKernel):
    """Stands for the fused kernels: keys gathered by index, then one call, which keeps them for its backward."""

    name = "ragged"

    def plan(self, segments, device, dtype):
        return segments, super().plan(segments, device, dtype)

    def prepare(self, k, v, plan):
        return super().prepare(k, v, plan[1])

    def attend(self, q, k, v, plan, **asked):
        return dense_attention(q, k, v, plan[0])


def dense_attention(q, k, v, segments):
    rows = []
    key_ends = itertools.accumulate(segment.key_tokens for segment in segments)
    for segment, end in zip(segments, key_ends, strict=True):
        n, m = segment.query_tokens, segment.key_tokens
        keys, values = (x[end - m : end].transpose(0, 1) for x in (k, v))  # [G, m, D]
        heads = q.shape[1] // k.shape[1]  # of each group
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n).repeat(heads, 1)
        queries = q[segment.query_start : segment.query_end].unflatten(1, (-1, heads))  # [n, G, H / G, D]
        queries = queries.permute(1, 2, 0, 3).flatten(1, 2)
        scores = queries @ keys.transpose(1, 2) / q.shape[2] ** 0.5
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
        rows.append(out.unflatten(1, (heads, n)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(rows)


def attend_in_parts(batch):
    """{(kernel, keep): (run_index, output and gradients of q, k, v of this rank's tokens)}."""
    from megadpo.config.grid import Grid
    from megadpo.model.context import _PreparedAgain, attend_over_context
    from megadpo.model.kernels.cpu import CpuKernel
    from megadpo.model.kernels.sdpa import SdpaKernel
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(context=2), setup_device("auto"))
    part = context_part(batch, parallel.grid.cp_rank, 2)
    places = []  # what the kernels' backward asked for that had not been kept
    unpack = _PreparedAgain.unpack
    _PreparedAgain.unpack = lambda self, kept: (places.append(isinstance(kept, tuple)), unpack(self, kept))[1]
    results = {}
    for kernel in (CpuKernel(), SdpaKernel(), RaggedStandIn()):
        plan = kernel.plan(part.segments, torch.device("cpu"), torch.float64)
        for keep in (False, True):
            q, k, v, upstream = (x[part.run_index] for x in inputs(batch.tokens.numel()))
            leaves = [x.requires_grad_() for x in (q, k, v)]
            out = attend_over_context(kernel, *leaves, plan, group=parallel.cp_group, keep_gathered=keep)
            grads = torch.autograd.grad(out, leaves, upstream)
            results[kernel.name, keep] = part.run_index, [x.detach() for x in (out, *grads)]
            # SDPA's keys are copies where they are joined of several ranges
            assert keep or kernel.name == "sdpa" or any(places)
            places.clear()
    return results


@pytest.mark.distributed
def test_gathered_attention_equals_attention_of_one_process():
    batch = pack_pairs(random_pairs(), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    q, k, v, upstream = inputs(batch.tokens.numel())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = reference_attention(*leaves, batch.segments)
    want = [out.detach(), *torch.autograd.grad(out, leaves, upstream)]
    for by_case in run_distributed(attend_in_parts, 2, batch, init_process_group=False):
        for run_index, got in by_case.values():
            for mine, whole in zip(got, want, strict=True):
                torch.testing.assert_close(mine, whole[run_index], rtol=1e-11, atol=1e-12)


class _MallInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def bytes_in_use():
    """What malloc has handed out and not got back, by glibc's mallinfo2."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _MallInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def bytes_kept_for_backward(folder, context, lengths):
    """By a training model's forward pass, on this rank."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(context=context), setup_device("auto"))
    arch = read_architecture(folder)
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision="float32",
        megatron_cfg=MegatronConfig(context_parallel_size=context),
    )
    (model,) = chunks = build_model(arch, policy, parallel, frozen=False)
    load_hf_weights(chunks, arch, folder, parallel.grid)
    pairs = random_pairs(lengths, 320)
    whole = pack_pairs(pairs, share_prompt=True, pad_to_multiple=context, pad_token_id=0)
    batch = context_part(whole, parallel.grid.cp_rank, context)
    plan = model.kernel.plan(batch.segments, parallel.device, torch.float32)
    model.kernel.plan = lambda *_: plan  # made beforehand: the masks of the CPU's kernels are no activations either
    # Once before: what is made at the first use is no activation. Its graph is kept, because gloo's thread lets go of the last
    # collective's tensor at some time later
    first = model(batch)
    gc.collect()
    before = bytes_in_use()
    logps = model(batch)
    gc.collect()
    kept = bytes_in_use() - before
    (first.sum() + logps.sum()).backward()
    return kept


@pytest.mark.distributed
@pytest.mark.parametrize("lengths", [[(200, 100, 100)] * 10, [(2000, 1000, 1000)]], ids=["short", "long"])
def test_activations_fall_with_the_ranks(lengths, tmp_path):
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("no glibc with mallinfo2 to count bytes with")
    folder = make_model(tmp_path / "model", num_key_value_heads=4)  # as many as heads: gathered keys weigh most
    (alone,) = run_distributed(bytes_kept_for_backward, 1, folder, 1, lengths, init_process_group=False)
    halves = run_distributed(bytes_kept_for_backward, 2, folder, 2, lengths, init_process_group=False)
    assert all(0.49 * alone < half < 0.52 * alone for half in halves)  # 0.59 where gathered keys are kept
