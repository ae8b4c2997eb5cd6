"""Several training sets with weights: their shares in every stretch of an epoch, passes over each set, and resuming."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.grid import Grid
from megadpo.config.problems import DataError
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.batches.mixture import counts_of, mixed_order
from megadpo.data.chosen import ChosenPairs
from tests.data.batches.test_groups import dataset, grouped_pairs, loader

SHARES = st.lists(st.integers(1, 9), min_size=2, max_size=4).map(lambda parts: [part / sum(parts) for part in parts])


def mixture(sizes: list[int], shares: tuple[float, ...], **changes: Any) -> GlobalBatchLoader:
    sets = [dataset(grouped_pairs([2] * size, seed=number)) for number, size in enumerate(sizes)]
    return loader(ChosenPairs.of(sets), shares=shares, **changes)


@given(SHARES, st.integers(1, 200))
def test_every_pair_of_an_epoch_is_some_sets(shares: list[float], total: int) -> None:
    counts = counts_of(shares, total)
    assert counts.sum() == total and (abs(counts - np.array(shares) * total) < 1).all()


@given(SHARES, st.lists(st.integers(1, 30), min_size=4, max_size=4), st.integers(0, 3), st.booleans())
def test_shares_hold_all_along_and_passes_are_whole(
    shares: list[float], sizes: list[int], epoch: int, shuffle: bool
) -> None:
    of_set = np.repeat(np.arange(len(shares)), sizes[: len(shares)])
    total, seed = len(of_set), 3 if shuffle else None
    drawn = [mixed_order(of_set, shares, total, epoch=e, seed=seed, prompts=None) for e in range(epoch + 1)]
    counts = counts_of(shares, total)
    for number, count in enumerate(counts.tolist()):
        before = np.cumsum(of_set[drawn[-1]] == number)
        assert abs(before - count * np.arange(1, total + 1) / total).max() <= 1 + len(shares) / 2 * count / total
        stream = np.concatenate([one[of_set[one] == number] for one in drawn])
        size = sizes[number]
        for start in range(0, len(stream), size):  # each pair once in a pass, whatever the epoch
            assert len(set(stream[start : start + size].tolist())) == len(stream[start : start + size])
        if not shuffle:
            first = int(np.flatnonzero(of_set == number)[0])
            assert stream.tolist() == [first + place % size for place in range(len(stream))]


def test_a_loaders_global_batches() -> None:
    made = mixture([30, 50], (0.75, 0.25), drop_last=True)
    assert (made.batches_per_epoch, made.dropped_per_epoch) == (10, 0)
    for epoch in range(3):
        batches = [batch.pair_indices for batch in made.batches(epoch)]
        assert [len(batch) for batch in batches] == [8] * 10
        assert [sum(row < 30 for row in batch) for batch in batches] == [6] * 10
    assert made.mixture == [
        "made: 60 pairs of each epoch (75.0%), 2.00 passes over its 30",
        "made: 20 pairs of each epoch (25.0%), 0.40 passes over its 50",
    ]


def test_the_order_is_that_of_seed_and_epoch_alone() -> None:
    one = mixture([30, 50], (0.6, 0.4), drop_last=True)
    rows = [batch.pair_indices for batch in one.batches(1)]
    other = mixture([30, 50], (0.6, 0.4), drop_last=True, grid=Grid(data=2, rank=1))
    assert [batch.pair_indices for batch in other.batches(1, start_batch=4)] == rows[4:]
    assert rows != [batch.pair_indices for batch in one.batches(2)]
    assert rows != [batch.pair_indices for batch in mixture([30, 50], (0.6, 0.4), drop_last=True, seed=8).batches(1)]


def test_pairs_of_one_prompt_follow_each_other() -> None:
    sets = [dataset(grouped_pairs([4] * 6, seed=number)) for number in range(2)]
    made = loader(ChosenPairs.of(sets), shares=(0.5, 0.5), global_batch_size=12)
    assert made.groups is not None
    prompts = [made.groups.prompts[positions].tolist() for positions in made.cut(made.order(0))]
    assert all(len(Counter(batch)) == 2 for batch in prompts), "a group of six pairs of each set"


def test_a_set_without_pairs_is_refused() -> None:
    sets = [dataset(grouped_pairs([2, 2])), dataset(grouped_pairs([2], seed=1))]
    with pytest.raises(DataError, match="no pairs to train on"):
        loader(ChosenPairs.of(sets, [np.arange(2), np.arange(0)]), shares=(0.5, 0.5), global_batch_size=1)
