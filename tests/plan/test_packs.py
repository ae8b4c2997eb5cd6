"""Counts of packs against the packs of training."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.data.batches.pack import pack_pairs
from megadpo.data.pairs import TokenizedPair
from megadpo.plan.inputs import architectures, choose_pairs
from megadpo.plan.packs import Pack, all_pairs, full_pack, pack_tokens, packed_lengths, workload
from megadpo.plan.trace import empty_pack
from megadpo.train.inputs import TRAIN, open_run_inputs
from tests.helpers.runs import make_config, make_model, ranked_pairs
from tests.plan.cases import SMALL, write_case


def config_with(*, share_prompt):
    packing = SimpleNamespace(enabled=True, share_prompt=share_prompt)
    return SimpleNamespace(policy=SimpleNamespace(sequence_packing=packing, make_sequence_length_divisible_by=1))


LENGTHS = st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6)


@given(LENGTHS, st.booleans())
def test_tokens_and_attention_of_a_pack_are_those_of_its_segments(lengths, share_prompt):
    rows = np.array(lengths, dtype=np.int64)
    pairs = [TokenizedPair(i, *(np.zeros(n, dtype=np.int32) for n in row)) for i, row in enumerate(lengths)]
    pack = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
    seen = sum(s.key_tokens - i for s in pack.segments for i in range(s.query_tokens))
    cfg = config_with(share_prompt=share_prompt)
    answers, keys = int(rows[:, 1:].sum()), sum(s.key_tokens for s in pack.segments)
    counted = Pack.of(cfg, rows)
    assert (counted.tokens, counted.answer_tokens) == (pack.num_tokens, answers)
    assert (counted.query_keys(), counted.key_tokens()) == (seen, keys)


@given(LENGTHS, st.booleans(), st.integers(1, 50))
def test_keys_of_a_pack_within_a_window_are_those_of_its_segments(lengths, share_prompt, window):
    rows = np.array(lengths, dtype=np.int64)
    pairs = [TokenizedPair(i, *(np.zeros(n, dtype=np.int32) for n in row)) for i, row in enumerate(lengths)]
    pack = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
    counted = Pack.of(config_with(share_prompt=share_prompt), rows)
    reached = [segment.rows(0, segment.query_tokens, window) for segment in pack.segments]
    assert counted.key_tokens(window) == sum(segment.key_tokens for segment in reached)
    seen = (min(s.key_tokens - i, window) for s in pack.segments for i in range(s.query_tokens))
    assert counted.query_keys(window) == sum(seen)


@given(st.lists(st.integers(1, 900), min_size=3, max_size=6), st.integers(1030, 9000), st.booleans())
def test_a_full_pack_fills_the_budget_to_the_last_token(tmp_path_factory, row, budget, share_prompt):
    path = tmp_path_factory.mktemp("pack")
    packing = {"train_mb_tokens": budget, "share_prompt": share_prompt}
    cfg = load_config(write_case(path / "case", SMALL, sequence_packing=packing))
    pack = full_pack(cfg, all_pairs(row, 1))
    assert packed_lengths(pack, share_prompt=share_prompt).sum() == pack_tokens(cfg) and pack.min() > 0


@given(st.lists(st.lists(st.integers(1, 40), min_size=3, max_size=6), min_size=1, max_size=5), st.integers(1, 50))
def test_a_pack_of_groups_is_counted_as_it_is_computed(groups, window):
    cfg = config_with(share_prompt=True)
    rows = np.array([row + [0] * (6 - len(row)) for row in groups], dtype=np.int64)
    pack = empty_pack(cfg, rows)
    counted = Pack.of(cfg, rows)
    assert (counted.tokens, counted.answer_tokens) == (pack.num_tokens, int(rows[:, 1:].sum()))
    assert pack.num_answers == sum(len(row) - 1 for row in groups)
    for limit in (None, window):
        reached = [segment.rows(0, segment.query_tokens, limit) for segment in pack.segments]
        assert counted.key_tokens(limit) == sum(segment.key_tokens for segment in reached)
        near = 10**9 if limit is None else limit
        seen = (min(s.key_tokens - i, near) for s in pack.segments for i in range(s.query_tokens))
        assert counted.query_keys(limit) == sum(seen)


@pytest.mark.parametrize(
    ("overrides", "count", "batch_pairs"),
    [
        (["policy.train_global_batch_size=24", "data.group_prompts=true"], 120, 24),
        (["policy.train_global_batch_size=24", "data.group_prompts=false"], 120, 24),
        # one answer that is better than three: split, it would balance the ranks
        (["policy.train_global_batch_size=3", "dpo.loss_type=plackett_luce"], 60, 9),
    ],
)
@pytest.mark.parametrize("begin", [0, 16])
def test_a_workload_is_what_the_loader_deals(tmp_path, overrides, count, batch_pairs, begin):
    path = ranked_pairs(tmp_path / "ranked.jsonl", prompts=20, answers=4, seed=0, begin=begin)
    if count < 120:
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(row for row in rows if json.loads(row)["chosen"].endswith("no0")))
    data = {"train_data_path": str(path)}
    config = make_config(
        tmp_path, make_model(tmp_path / "model"), data=data,
        policy={"max_total_sequence_length": 128, "sequence_packing": {"train_mb_tokens": 300}},
    )  # fmt: skip
    cfg = load_config(config, overrides)
    inputs = open_run_inputs(cfg, Grid(data=2), sets=[TRAIN], weights=False)
    pairs, origin = choose_pairs(cfg, None)
    assert origin.endswith(f"{count} pairs of 20 prompts" if cfg.data.group_prompts else f"{count} pairs")
    work = workload(cfg, inputs.arch, pairs, origin, dp=2)
    loader = inputs.train_loader
    deals = [deal for _, deal in loader.deals(0)]
    assert work.batches == len(deals) == count // batch_pairs and work.pairs_per_batch == batch_pairs
    assert work.micro_batches == max(len(rank) for deal in deals for rank in deal)
    packs = [
        loader.pack(positions[numbers], positions)
        for positions, deal in loader.deals(0)
        for rank in deal
        for numbers in rank
    ]
    assert work.total.tokens == sum(len(pack.tokens) for pack in packs)
    assert work.total.answer_tokens == sum(len(pack.targets) for pack in packs)
    keys = sum(s.key_tokens for pack in packs for s in pack.segments if s.query_end <= pack.num_tokens)
    assert work.total.key_tokens() == keys + sum(len(pack.tokens) - pack.num_tokens for pack in packs)
    seen = sum(s.key_tokens - i for pack in packs for s in pack.segments for i in range(s.query_tokens))
    assert work.total.query_keys() == seen - sum(
        p * (p + 1) // 2 for p in (len(pack.tokens) - pack.num_tokens for pack in packs)
    )


def test_stated_rankings_are_counted_whole(tmp_path):
    sizes = {"max_total_sequence_length": 400, "sequence_packing": {"train_mb_tokens": 1000}}
    path = write_case(tmp_path / "case", SMALL, **sizes)
    cfg = load_config(path, ["dpo.loss_type=plackett_luce"])
    arch, _ = architectures(cfg)
    pairs, origin = choose_pairs(cfg, "100,50,50,50")
    work = workload(cfg, arch, pairs, origin, dp=1)
    assert (work.rankings_per_batch, work.pairs_per_batch, work.batches) == (8, 24, 1)
    assert work.total.tokens == 8 * 250 and work.micro_batches == 2
    with pytest.raises(ConfigError, match="at least a ranking's 1100 tokens"):
        workload(cfg, arch, choose_pairs(cfg, "100,250,250,250,250")[0], origin, dp=1)
