"""Counts of packs against the packs of training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.load import load_config
from megadpo.data.batches.pack import pack_pairs
from megadpo.data.pairs import TokenizedPair
from megadpo.plan.packs import Pack, full_pack, pack_tokens, packed_lengths
from tests.plan.cases import SMALL, write_case

LENGTHS = st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6)


@given(LENGTHS, st.booleans())
def test_tokens_and_attention_of_a_pack_are_those_of_its_segments(lengths, share_prompt):
    rows = np.array(lengths, dtype=np.int64)
    pairs = [TokenizedPair(i, *(np.zeros(n, dtype=np.int32) for n in row)) for i, row in enumerate(lengths)]
    pack = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
    seen = sum(s.key_tokens - i for s in pack.segments for i in range(s.query_tokens))
    cfg = SimpleNamespace(
        policy=SimpleNamespace(sequence_packing=SimpleNamespace(enabled=True, share_prompt=share_prompt))
    )
    answers, keys = int(rows[:, 1:].sum()), sum(s.key_tokens for s in pack.segments)
    counted = Pack.of(cfg, rows)
    assert (counted.tokens, counted.answer_tokens) == (pack.num_tokens, answers)
    assert (counted.query_keys(), counted.key_tokens()) == (seen, keys)


@given(LENGTHS, st.booleans(), st.integers(1, 50))
def test_keys_of_a_pack_within_a_window_are_those_of_its_segments(lengths, share_prompt, window):
    rows = np.array(lengths, dtype=np.int64)
    pairs = [TokenizedPair(i, *(np.zeros(n, dtype=np.int32) for n in row)) for i, row in enumerate(lengths)]
    pack = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
    counted = Pack(pack.num_tokens, int(rows[:, 1:].sum()), rows, share_prompt)
    reached = [segment.rows(0, segment.query_tokens, window) for segment in pack.segments]
    assert counted.key_tokens(window) == sum(segment.key_tokens for segment in reached)
    seen = (min(s.key_tokens - i, window) for s in pack.segments for i in range(s.query_tokens))
    assert counted.query_keys(window) == sum(seen)


@given(st.tuples(*[st.integers(1, 900)] * 3), st.integers(1030, 9000), st.booleans())
def test_a_full_pack_fills_the_budget_to_the_last_token(tmp_path_factory, row, budget, share_prompt):
    path = tmp_path_factory.mktemp("pack")
    packing = {"train_mb_tokens": budget, "share_prompt": share_prompt}
    cfg = load_config(write_case(path / "case", SMALL, sequence_packing=packing))
    pack = full_pack(cfg, np.array([row], dtype=np.int64))
    assert packed_lengths(pack, share_prompt=share_prompt).sum() == pack_tokens(cfg) and pack.min() > 0
