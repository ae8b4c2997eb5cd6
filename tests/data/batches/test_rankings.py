"""Global batches of rankings: which pairs they hold, that none is split, and which data has none."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from megadpo.config import build_config
from megadpo.config.grid import Grid
from megadpo.config.problems import DataError
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.batches.rankings import refuse_no_rewards
from megadpo.data.pairs import TokenizedPair
from megadpo.families import parse_architecture
from tests.data.batches.test_groups import dataset, grouped_pairs, loader
from tests.data.batches.test_work import LLAMA_8B
from tests.helpers.configs import tree_with

SIZES = [2, 4, 3, 5, 2, 4, 3, 3]


def of_rankings(sizes: list[int], **changes: Any) -> GlobalBatchLoader:
    return loader(dataset(grouped_pairs(sizes)), **{"global_batch_size": 3, "by_rankings": True, **changes})


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_global_batch_is_so_many_whole_rankings(shuffle: bool) -> None:
    made = of_rankings(SIZES, shuffle=shuffle)
    batches = made.cut(made.order(0))
    assert (made.batches_per_epoch, len(batches)) == (3, 3)
    prompts = [set(made.groups.prompts[batch].tolist()) for batch in batches]  # type: ignore[union-attr]
    assert [len(one) for one in prompts] == [3, 3, 2] and set.union(*prompts) == set(range(8))
    assert sum(map(len, batches)) == sum(n * (n - 1) // 2 for n in SIZES)
    if not shuffle:
        assert made.order(0)[0] == 0 and (made.order(3) == made.order(0)).all()


def test_drop_last_leaves_out_rankings() -> None:
    made = of_rankings(SIZES, drop_last=True)
    assert (made.batches_per_epoch, made.dropped_per_epoch, made.unit) == (2, 2, "rankings")
    with pytest.raises(DataError, match="8 rankings"):
        of_rankings(SIZES, drop_last=True, global_batch_size=9)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_no_ranking_is_split_and_shares_make_a_mean_over_rankings(ranks: int) -> None:
    whole = of_rankings(SIZES)
    loaders = [of_rankings(SIZES, grid=Grid(data=ranks, rank=rank)) for rank in range(ranks)]
    prompts = dict(zip(whole.dataset.rows.tolist(), whole.groups.prompts.tolist(), strict=True))  # type: ignore[union-attr]
    for parts in zip(*(one.batches(epoch=1) for one in loaders), strict=True):
        packs = [pack for part in parts for pack in part.micro_batches if pack.num_pairs]
        seen = Counter(prompt for pack in packs for prompt in {prompts[row] for row in pack.pair_indices.tolist()})
        assert set(seen.values()) == {1}
        total = 0.0
        for pack in packs:
            rows = pack.pair_indices.tolist()
            shares = pack.ranking_shares.tolist()  # type: ignore[union-attr]
            total += sum(shares)
            # Of one ranking every answer but the worst has shares of 1 in all, times pairs / rankings
            by_prompt = Counter[int]()
            for row, share in zip(rows, shares, strict=True):
                by_prompt[prompts[row]] += share
            for prompt, share in by_prompt.items():
                terms = len(
                    {
                        chosen
                        for row, chosen in zip(rows, pack.pairs[:, 0].tolist(), strict=True)
                        if prompts[row] == prompt
                    }
                )
                assert share == pytest.approx(terms * parts[0].num_pairs / len(seen), rel=1e-6)


def rewritten(pairs: list[TokenizedPair], change: str) -> list[TokenizedPair]:
    """The pairs of one ranking of four, spoilt."""

    def best(pair: TokenizedPair) -> bool:
        return sum(np.array_equal(one.chosen_ids, pair.chosen_ids) for one in pairs) == 3

    def worst(pair: TokenizedPair) -> bool:
        return sum(np.array_equal(one.rejected_ids, pair.rejected_ids) for one in pairs) == 3

    made = {
        "twice": [*pairs, pairs[0]],
        "contradiction": [
            *pairs,
            dataclasses.replace(pairs[0], chosen_ids=pairs[0].rejected_ids, rejected_ids=pairs[0].chosen_ids),
        ],
        "missing": [pair for pair in pairs if not (best(pair) and worst(pair))],
        "weight": [dataclasses.replace(pairs[0], weight=0.5), *pairs[1:]],
    }[change]
    return [dataclasses.replace(pair, index=number) for number, pair in enumerate(made)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("twice", "a pair that is there twice"),
        ("contradiction", "pairs that contradict each other"),
        ("missing", "5 pairs of 4 answers"),
        ("weight", "weight 0.5"),
    ],
)
def test_pairs_that_are_no_ranking_are_refused(change: str, words: str) -> None:
    pairs = rewritten(grouped_pairs([4]), change)
    with pytest.raises(DataError, match=re.escape(words)):
        loader(dataset(pairs), by_rankings=True, global_batch_size=1)


def test_answers_that_are_equally_good_have_no_pair() -> None:
    prompt = np.array([5], np.int32)
    a, b, c, d = (np.array([n], np.int32) for n in (6, 7, 8, 9))
    ties = [(a, c), (a, d), (b, c), (b, d)]
    made = [TokenizedPair(row, prompt, *texts) for row, texts in enumerate(ties)]
    loader(dataset(made), by_rankings=True, global_batch_size=1)
    apart = [
        TokenizedPair(row, prompt, *texts) for row, texts in enumerate([(a, b), (c, d)])
    ]  # a or c: which is better?
    with pytest.raises(DataError, match="2 pairs of 4 answers"):
        loader(dataset(apart), by_rankings=True, global_batch_size=1)


def test_a_ranking_larger_than_a_pack_is_refused() -> None:
    with pytest.raises(DataError, match="a ranking of .* packed tokens"):
        of_rankings([2, 5], budget_tokens=32, global_batch_size=1)


def test_rows_without_rewards_are_named() -> None:
    pairs = grouped_pairs([2, 2, 2])
    rewarded = [dataclasses.replace(pair, rewards=(1.0, 0.5)) for pair in pairs[:2]]
    refuse_no_rewards(dataset(rewarded), "rpo")
    with pytest.raises(DataError, match=r"made:3.*a pair without rewards.*1 of 3 pairs"):
        refuse_no_rewards(dataset([*rewarded, pairs[2]]), "rpo")


def test_rewards_are_needed_where_the_loss_is_computed() -> None:
    """Also to log it, with weight 0."""
    pairs, arch = dataset(grouped_pairs([2, 2, 2])), parse_architecture(LLAMA_8B)
    sft = {"loss_type": "rpo", "preference_loss_weight": 0, "sft_loss_weight": 1}
    for reference, needed in (("resident", True), ("none", False)):
        cfg = build_config(tree_with(dpo={**sft, "reference": {"mode": reference}}))
        with pytest.raises(DataError, match="a pair without rewards") if needed else nullcontext():
            GlobalBatchLoader.from_config(pairs, cfg, arch, pad_token_id=0, training=False)


def test_weights_and_rewards_come_with_the_packs() -> None:
    pairs = grouped_pairs([3])
    plain = next(loader(dataset(pairs)).batches(epoch=0)).micro_batches[0]
    assert plain.weights is None and plain.reward_gaps is None
    pairs[1] = dataclasses.replace(pairs[1], weight=0.25, rewards=(3.0, 1.0))
    (batch,) = loader(dataset(pairs)).batches(epoch=0)
    (pack,) = batch.micro_batches
    weights = dict(zip(pack.pair_indices.tolist(), pack.weights.tolist(), strict=True))  # type: ignore[union-attr]
    gaps = dict(zip(pack.pair_indices.tolist(), pack.reward_gaps.tolist(), strict=True))  # type: ignore[union-attr]
    assert weights == {0: 1.0, 1: 0.25, 2: 1.0} and gaps[1] == 2.0 and np.isnan([gaps[0], gaps[2]]).all()
    assert len(list(combinations(range(3), 2))) == pack.num_pairs
