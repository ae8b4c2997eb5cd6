"""Histograms and gaps of the report."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadpo.rollouts.group import Group
from megadpo.rollouts.pairing import PairingOptions
from megadpo.rollouts.report import MOST_BINS, histogram, pairs_at_gaps
from tests.rollouts.builders import rollout


@given(st.lists(st.floats(-1e300, 1e300) | st.integers(0, 5).map(float), min_size=1))
def test_a_histogram_counts_every_value_once(values):
    bins = histogram(np.array(values))
    assert sum(bins.counts) == len(values)
    assert len(bins.labels) == len(bins.counts) <= MOST_BINS


def test_few_values_are_counted_each_and_rounding_is_not_seen():
    bins = histogram(np.array([1.0, 0.9 - 0.7, 0.2, 0.2, -1.0]))
    assert (bins.labels, bins.counts) == (["-1", "0.2", "1"], [1, 3, 1])


def test_many_values_are_counted_in_ten_bins():
    bins = histogram(np.arange(100) / 100)
    assert bins.counts == [10] * 10 and bins.labels[0] == "0 .. 0.099"


def test_other_gaps_go_as_far_as_the_rewards_do():
    def gaps(*rewards: float) -> list[float]:
        group = Group("g", [rollout(reward, line=line) for line, reward in enumerate(rewards, start=1)])
        return [at.min_gap for at in pairs_at_gaps([group], PairingOptions(min_gap=0.1), balance=False)]

    assert gaps(0, 0) == [0, 0.1]
    assert gaps(0, 0.4) == [0, 0.05, 0.1, 0.15, 0.2, 0.3]
    assert gaps(-1, 1) == [0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 1.5, 2]
