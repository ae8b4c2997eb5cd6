"""Pairs with a common prompt: what is computed once, which pairs stay together, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.grid import Grid
from megadpo.data.batches.groups import PairGroups, deal_groups
from megadpo.data.batches.loader import BatchOptions, GlobalBatchLoader
from megadpo.data.batches.pack import pack_pairs
from megadpo.data.batches.rebalance import BALANCE
from megadpo.data.batches.work import WorkModel
from megadpo.data.pairs import DataReport, FlatPairs, PairDataset, TokenizedPair

MODEL = WorkModel(per_token=3000, per_answer_token=500, per_query_key={None: 5, 6: 2})


def random_ids(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.integers(3, 30_000, length, dtype=np.int32)


def grouped_pairs(sizes: list[int], *, seed: int = 0, longest: int = 12) -> list[TokenizedPair]:
    """All pairs of `sizes[i]` answers to prompt i, rows counted on, in a shuffled order."""
    rng = np.random.default_rng(seed)
    pairs = []
    for size in sizes:
        prompt = random_ids(rng, int(rng.integers(1, longest)))
        answers = [random_ids(rng, int(rng.integers(1, longest))) for _ in range(size)]
        pairs += [(prompt, a, b) for a, b in combinations(answers, 2)]
    rng.shuffle(pairs)  # type: ignore[arg-type]
    return [TokenizedPair(row, *texts) for row, texts in enumerate(pairs)]


def dataset(pairs: list[TokenizedPair]) -> PairDataset:
    flat = FlatPairs.of(pairs)
    report = DataReport(
        path="made", rows=len(pairs), pairs=len(pairs), prompt_tokens=1, chosen_tokens=1, rejected_tokens=1,
        with_chat_template=False, max_token_id=30_000, fingerprint="",
    )  # fmt: skip
    return PairDataset(**vars(flat), lines=np.arange(1, len(pairs) + 1), report=report)


def loader(pairs: PairDataset, **changes: Any) -> GlobalBatchLoader:
    options: dict[str, Any] = {
        "global_batch_size": 8, "shuffle": True, "seed": 7, "share_prompt": True, "group_prompts": True,
        "pad_token_id": 0, "budget_tokens": 160, "drop_last": False, "prefetch": False,
    }  # fmt: skip
    ranks = {name: changes.pop(name) for name in ("work_model", "grid") if name in changes}
    return GlobalBatchLoader(pairs, BatchOptions(**{**options, **changes}), **ranks)


def named(pairs: list[TokenizedPair], prompts: np.ndarray, answers: np.ndarray) -> PairGroups:
    """Groups by these numbers, whatever the texts are."""
    texts = FlatPairs.of(pairs).text_tokens()
    return PairGroups.made(prompts, answers, texts[:, 0], texts[:, 1:])


SIZES = st.lists(st.integers(2, 5), min_size=2, max_size=8)


def test_answers_are_the_same_by_tokens_mask_and_prompt() -> None:
    prompt, other = np.array([5, 6], np.int32), np.array([5, 7], np.int32)
    a, b, c = (np.array(ids, np.int32) for ids in ([8], [9, 10], [11]))
    masked = np.array([True, False])
    pairs = [
        TokenizedPair(0, prompt, a, b),
        TokenizedPair(1, other, a, b),
        TokenizedPair(2, prompt, b, c),
        TokenizedPair(3, prompt, b, c, chosen_mask=masked),
    ]
    groups = PairGroups.of(FlatPairs.of(pairs))
    assert groups.prompts.tolist() == [0, 1, 0, 0]
    assert groups.answers.tolist() == [[0, 1], [2, 3], [1, 4], [5, 4]]


def test_a_group_is_in_the_run_once() -> None:
    prompt, (a, b, c) = np.array([1, 2, 3], np.int32), (np.array(x, np.int32) for x in ([4, 5], [6], [7, 8, 9]))
    pairs = [TokenizedPair(0, prompt, a, b), TokenizedPair(1, prompt, c, b), TokenizedPair(2, prompt, a, c)]
    same = np.array([0, 0, 0]), np.array([[0, 1], [2, 1], [0, 2]])
    batch = pack_pairs(pairs, share_prompt=True, pad_to_multiple=1, pad_token_id=0, groups=named(pairs, *same))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 3, 4, 5]
    assert [segment.keys for segment in batch.segments] == [
        ((0, 3),), ((0, 3), (3, 5)), ((0, 3), (5, 6)), ((0, 3), (6, 9))
    ]  # fmt: skip
    assert batch.pairs.tolist() == [[0, 1], [2, 1], [0, 2]]
    assert batch.answer_tokens.tolist() == [2, 1, 3] and (batch.num_pairs, batch.num_answers) == (3, 3)
    assert batch.predict_index.tolist() == [2, 3, 2, 2, 6, 7] and batch.targets.tolist() == [4, 5, 6, 7, 8, 9]


def test_texts_that_differ_are_never_taken_for_one() -> None:
    pairs = grouped_pairs([2, 2])
    zeros = np.zeros(2, np.int64)
    one_prompt = named(pairs, zeros, np.arange(4).reshape(2, 2))
    with pytest.raises(AssertionError, match="two prompts have the same hash"):
        pack_pairs(pairs, share_prompt=True, pad_to_multiple=1, pad_token_id=0, groups=one_prompt)
    one = [pairs[0], TokenizedPair(1, pairs[0].prompt_ids, pairs[1].chosen_ids, pairs[1].rejected_ids)]
    one_pair = named(one, zeros, np.array([[0, 1], [0, 1]]))
    with pytest.raises(AssertionError, match="two answers have the same hash"):
        pack_pairs(one, share_prompt=True, pad_to_multiple=1, pad_token_id=0, groups=one_pair)


@given(sizes=SIZES, seed=st.integers(0, 99), batch=st.integers(1, 12), ranks=st.integers(1, 4), epoch=st.integers(0, 2))
def test_every_pair_comes_once_an_epoch_with_its_own_texts_on_any_number_of_ranks(
    sizes: list[int], seed: int, batch: int, ranks: int, epoch: int
) -> None:
    pairs = grouped_pairs(sizes, seed=seed)
    made = dataset(pairs)
    by_rank = [
        list(
            loader(made, global_batch_size=batch, work_model=MODEL, grid=Grid(data=ranks, rank=rank)).batches(epoch)
        )
        for rank in range(ranks)
    ]  # fmt: skip
    seen = []
    alone = loader(made, global_batch_size=batch)
    for number, batches in enumerate(zip(*by_rank, strict=True)):
        packs = [pack for one in batches for pack in one.micro_batches]
        rows = [row for pack in packs for row in pack.pair_indices.tolist()]
        seen += rows
        expected = alone.order(epoch)[number * batch : (number + 1) * batch].tolist()
        assert sorted(rows) == sorted(expected), "the same pairs a global batch on any number of ranks"
        assert sum(pack.num_tokens for pack in packs) == batches[0].num_tokens
        assert len({len(one.micro_batches) for one in batches}) == 1
        for pack in packs:
            assert pack.run_tokens <= 160
            starts = np.concatenate([[0], np.cumsum(pack.answer_tokens.numpy())])
            for row, answers in zip(pack.pair_indices.tolist(), pack.pairs.tolist(), strict=True):
                for ids, answer in zip((pairs[row].chosen_ids, pairs[row].rejected_ids), answers, strict=True):
                    assert pack.targets[starts[answer] : starts[answer + 1]].tolist() == ids.tolist()
    assert sorted(seen) == list(range(len(pairs)))


def test_groups_stay_whole_in_global_batches_where_they_can() -> None:
    made = dataset(grouped_pairs([4] * 60 + [3] * 20 + [2] * 20))
    groups = PairGroups.of(made)
    plain = np.random.default_rng(1).permutation(groups.num_prompts).tolist()
    in_turn = np.concatenate([np.flatnonzero(groups.prompts == prompt) for prompt in plain])

    def split(order: np.ndarray, size: int) -> int:
        batches = np.arange(len(order)) // size
        return sum(len(set(batches[groups.prompts[order] == prompt])) > 1 for prompt in range(groups.num_prompts))

    for size in (64, 20, 7):
        order = groups.order(plain, size)
        assert sorted(order.tolist()) == list(range(len(made)))
        assert split(order, size) <= split(in_turn, size) * 0.65
    # in batches of 4 no group of 6 pairs can be whole
    order = groups.order(plain, 4)
    assert sorted(order.tolist()) == list(range(len(made)))


def test_without_common_prompts_nothing_changes() -> None:
    made = dataset(grouped_pairs([2] * 30))
    one, other = loader(made), loader(made, group_prompts=False)
    assert one.groups is None
    for a, b in zip(one.batches(1), other.batches(1), strict=True):
        assert a.pair_indices == b.pair_indices
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            assert torch.equal(x.tokens, y.tokens) and x.segments == y.segments


@pytest.mark.parametrize(
    ("answers", "changes", "unit"),
    [
        (3, {}, "prompts"),
        (3, {"by_rankings": True}, "rankings"),
        (3, {"shuffle": False}, "pairs"),
        (3, {"budget_tokens": None, "pairs_per_micro_batch": 1}, "pairs"),
        (2, {}, "pairs"),
        (2, {"by_rankings": True}, "pairs"),
    ],
)
def test_what_an_epochs_order_is_an_order_of(answers: int, changes: dict[str, Any], unit: str) -> None:
    """Where it is the same, so is the order: here of pairs that begin alike, with prompts in common or without."""
    pairs = [
        dataclasses.replace(one, chosen_ids=np.append(one.rejected_ids, one.chosen_ids))
        for one in grouped_pairs([2] * 30)
    ]
    made = dataset(pairs if answers == 2 else grouped_pairs([answers] * 10))
    one, other = loader(made, **changes), loader(made, shuffle=changes.get("shuffle", True), group_prompts=False)
    assert (one.order_unit, other.order_unit) == (unit, "pairs")
    same = [batch.tolist() for batch in one.cut(one.order(1))] == [
        batch.tolist() for batch in other.cut(other.order(1))
    ]
    assert same == (unit == "pairs")


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_the_same_work_though_groups_differ(ranks: int) -> None:
    made = dataset(grouped_pairs([4] * 40 + [8] * 6 + [2] * 60, longest=60))
    batch = loader(made, global_batch_size=256, budget_tokens=2048, work_model=MODEL, grid=Grid(data=ranks))
    for positions, deal in batch.deals(0, 0):
        if len(positions) < 256:
            continue
        _, work = batch.totals(positions, [pack for rank in deal for pack in rank])
        by_rank = work.reshape(ranks, -1).sum(axis=1)
        assert 1 - by_rank.min() / by_rank.max() <= 0.05


def test_work_is_that_of_the_packs_segments() -> None:
    pairs = grouped_pairs([4, 3, 2])
    batch = loader(dataset(pairs), global_batch_size=len(pairs), work_model=MODEL, budget_tokens=4096)
    ((positions, deal),) = batch.deals(0)
    pack = batch.pack(positions[deal[0][0]])
    (tokens,), (work,) = batch.totals(positions, deal[0])
    assert tokens == pack.num_tokens == pack.tokens.numel()
    seen = [s.key_tokens - back for s in pack.segments for back in range(s.query_tokens)]
    keys = 5 * sum(seen) + 2 * sum(min(keys, 6) for keys in seen)
    assert work == 16 * (3000 * tokens + 500 * int(pack.answer_tokens.sum()) + keys) // 3000


def test_a_group_is_split_where_a_rank_would_have_nothing_else() -> None:
    made = dataset(grouped_pairs([6], longest=30))
    groups = PairGroups.of(made)
    positions = np.arange(len(made))
    deal = deal_groups(
        groups, positions, num_ranks=4, budget_tokens=4096, work_model=None, micro_batch_multiple=1
    )  # fmt: skip
    pairs = [sorted(pair for pack in rank for pair in pack) for rank in deal]
    assert all(pairs) and sorted(pair for rank in pairs for pair in rank) == positions.tolist()


def test_a_group_larger_than_a_pack_is_split() -> None:
    made = dataset(grouped_pairs([8], longest=30))
    (whole,), _ = PairGroups.of(made).totals(np.arange(28), np.zeros(28, np.int64), 1, None)
    budget = int(whole) * 2 // 3
    batch = loader(made, global_batch_size=28, budget_tokens=budget)
    ((positions, deal),) = batch.deals(0)
    tokens, _ = batch.totals(positions, deal[0])
    assert len(deal[0]) > 1 and tokens.max() <= budget
    assert tokens.sum() < batch.lengths.sum() / 2, "most pairs still share"
    assert BALANCE < 0.05
