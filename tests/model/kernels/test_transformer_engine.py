"""What the transformer_engine kernel says to DotProductAttention, by a stand-in with Transformer Engine 2.11's own
arguments and its fallback. tests/gpu runs the real one."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

from megadpo.config.problems import ConfigError
from megadpo.data.batches.pack import pack_pairs
from megadpo.model.kernels.transformer_engine import TransformerEngineKernel
from tests.model.kernels.test_kernels import random_pairs, reference_attention


class DotProductAttention(torch.nn.Module):
    """Computes like Transformer Engine's unfused backend: attention_type 'self' takes the queries' lengths for the
    keys' (utils.py `get_padding_mask`)."""

    has_fused_kernel = True

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        attention_type="self",
        softmax_scale=None,
    ):
        super().__init__()
        assert attention_dropout == 0.0 and attention_type in ("self", "cross")
        widths = kv_channels if isinstance(kv_channels, tuple) else (kv_channels, kv_channels)
        self.sizes = (num_attention_heads, num_gqa_groups, *widths)
        self.scale = widths[0] ** -0.5 if softmax_scale is None else softmax_scale
        self.attention_type = attention_type
        self.unfused_attention = torch.nn.Identity()

    def forward(
        self,
        q,
        k,
        v,
        *,
        qkv_format,
        cu_seqlens_q,
        cu_seqlens_kv,
        max_seqlen_q,
        max_seqlen_kv,
        attn_mask_type,
        window_size,
    ):
        assert (q.shape[1], k.shape[1], q.shape[2], v.shape[2]) == self.sizes and qkv_format == "thd"
        left, right = window_size
        assert right == 0 and max_seqlen_q <= max_seqlen_kv  # else a window has no fused attention
        if not self.has_fused_kernel:
            return self.unfused_attention({}, q, k, v, qkv_layout="thd_thd_thd")
        of_keys = cu_seqlens_kv if self.attention_type == "cross" else cu_seqlens_q
        rows = []
        for (a, b), (c, d) in zip(_ranges(cu_seqlens_q), _ranges(of_keys), strict=True):
            assert b - a <= max_seqlen_q and d - c <= max_seqlen_kv
            bottom_right = d - c - (b - a) if attn_mask_type == "padding_causal_bottom_right" else 0
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(bottom_right)
            seen = seen if left < 0 else seen.triu(bottom_right - left)
            keys, values = (x[c:d].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("nhd,mhd->hnm", q[a:b], keys) * self.scale
            rows.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
        return torch.cat(rows).flatten(1)


def _ranges(cumulative):
    ends = cumulative.tolist()
    return list(itertools.pairwise(ends))


@pytest.fixture
def kernel(monkeypatch):
    te = types.ModuleType("transformer_engine.pytorch")
    te.DotProductAttention = DotProductAttention
    package = types.ModuleType("transformer_engine")
    package.pytorch = te
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", te)
    return TransformerEngineKernel()


def run(kernel, share_prompt, value_width=8, window=None, **asked):
    batch = pack_pairs(random_pairs(), share_prompt=share_prompt, pad_to_multiple=8, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch.tokens.numel(), *shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 8), (2, 8), (2, value_width))
    )
    plan = kernel.plan(batch.segments, torch.device("cpu"), torch.float64, window)
    got = kernel.attend(q, *kernel.prepare(k, v, plan), plan, **asked)
    return got, reference_attention(q, k, v, batch.segments, window=window, **asked)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize(
    "asked", [{}, {"window": 4}, {"scale": 0.7}, {"value_width": 5}, {"window": 3, "scale": 0.2, "value_width": 11}]
)
def test_it_describes_our_segments(kernel, share_prompt, asked):
    torch.testing.assert_close(*run(kernel, share_prompt, **asked), rtol=1e-12, atol=1e-12)


def test_layers_of_different_kinds_have_a_module_each(kernel):
    for asked in ({}, {"scale": 0.7}, {"value_width": 5}, {"window": 4}):
        torch.testing.assert_close(*run(kernel, True, **asked), rtol=1e-12, atol=1e-12)


def test_without_a_fused_kernel_it_refuses(kernel, monkeypatch):
    """Transformer Engine would go on with its unfused backend, without a word."""
    monkeypatch.setattr(DotProductAttention, "has_fused_kernel", False)
    with pytest.raises(ConfigError, match=r"policy\.attention_kernel: got 'transformer_engine'.*use 'varlen'"):
        run(kernel, True)
