"""Several data sets as one, and pairs held out by their prompts: the same pairs under other rows, nothing lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megadpo.config.problems import DataError
from megadpo.data.chosen import ChosenPairs, hold_out
from megadpo.data.pairs import OpenedPairs, PairDataset
from tests.data.batches.test_groups import dataset, grouped_pairs
from tests.data.builders import as_lists


def of(sizes: list[int], seed: int, path: str) -> PairDataset:
    made = dataset(grouped_pairs(sizes, seed=seed))
    report = dataclasses.replace(made.report, path=path, fingerprint=path)
    return dataclasses.replace(made, report=report)


def contents(pairs: OpenedPairs) -> list[tuple[list[int], ...]]:
    return [as_lists(pair)[1:] for pair in pairs]


def test_two_sets_as_one() -> None:
    a, b = of([3, 2], 0, "a"), of([4], 1, "b")
    both = ChosenPairs.of([a, b])
    assert len(both) == 4 + 6 and contents(both) == contents(a) + contents(b)
    assert both.rows.tolist() == [pair.index for pair in both] == list(range(10))
    assert (both.text_tokens() == np.concatenate([a.text_tokens(), b.text_tokens()])).all()
    assert (both.identities == np.concatenate([a.identities, b.identities])).all()
    assert [both.source_of(row) for row in (0, 3, 4, 9)] == ["a:1", "a:4", "b:1", "b:6"]
    assert (both.report.path, both.report.rows, both.report.pairs) == ("a + b", 10, 10)
    assert both.report.prompt_tokens == both.text_tokens()[:, 0].sum()
    assert [report.path for report in both.reports] == ["a", "b"]
    assert len({a.fingerprint, both.fingerprint, ChosenPairs.of([b, a]).fingerprint}) == 3
    twice = ChosenPairs.of([a, a])
    assert twice.rows.tolist() == list(range(8)) and twice.source_of(5) == "a:2"


@pytest.mark.parametrize("joined", [False, True])
def test_held_out_by_prompt(joined: bool) -> None:
    a, b = of([2, 3] * 20, 0, "a"), of([2] * 10, 1, "b")
    pairs: OpenedPairs = ChosenPairs.of([a, b]) if joined else a
    rest, held = hold_out(pairs, 0.1)
    prompts, (left, out) = pairs.identities[3::4], (set(one.identities[3::4].tolist()) for one in (rest, held))
    assert not left & out and left | out == set(prompts.tolist())
    assert len(out) == (5 if joined else 4)
    assert sorted(rest.rows.tolist() + held.rows.tolist()) == pairs.rows.tolist()
    for one in (rest, held):
        assert all(as_lists(pair) == as_lists(pairs[pair.index]) for pair in one)
        assert [one.source_of(pair.index) for pair in one] == [pairs.source_of(pair.index) for pair in one]
    assert len({pairs.fingerprint, rest.fingerprint, held.fingerprint}) == 3
    assert f"{len(out)} of {len(left | out)} prompts" in str(held.report)


def test_the_same_prompts_in_any_order_of_the_rows() -> None:
    pairs = grouped_pairs([3] * 30)
    _, held = hold_out(dataset(pairs), 0.2)
    again = [dataclasses.replace(pair, index=row) for row, pair in enumerate(reversed(pairs))]
    _, other = hold_out(dataset(again), 0.2)
    assert set(held.identities[3::4].tolist()) == set(other.identities[3::4].tolist())
    _, larger = hold_out(dataset(pairs), 0.4)
    assert set(held.identities[3::4].tolist()) < set(larger.identities[3::4].tolist())


def test_something_is_left_to_train_on() -> None:
    with pytest.raises(DataError, match="1 prompts"):
        hold_out(dataset(grouped_pairs([4])), 0.1)
    rest, held = hold_out(dataset(grouped_pairs([2, 2])), 0.001)
    assert (len(rest), len(held)) == (1, 1)
