"""Which answers make pairs: every pairing against the plain definition, over random groups."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.rollouts.left_out import GROUP_REASONS
from megadpo.rollouts.pairing import (
    Pairing,
    PairingOptions,
    RolloutPair,
    balance_lengths,
    select_pairs,
    why_no_pair,
)
from megadpo.rollouts.store import Rollout
from tests.rollouts.builders import rollout

# Few values, so that ties, equal answers and gaps of just the asked size come up
rewards = st.sampled_from([-1.0, 0.0, 0.1, 0.2, 0.6, 0.7, 1.0]) | st.floats(-2, 2)
drawn = st.tuples(rewards, st.integers(0, 5), st.integers(0, 40))
groups = st.lists(drawn, min_size=1, max_size=9).map(
    lambda rows: [rollout(r, answer=a, chars=c, line=n + 1) for n, (r, a, c) in enumerate(rows)]
)
option_sets = st.builds(
    PairingOptions,
    pairing=st.sampled_from(get_args(Pairing)),
    min_gap=st.sampled_from([0.0, 0.1, 0.15, 0.5, 3.0]),
    min_chosen_reward=st.none() | st.sampled_from([0.0, 0.6, 2.5]),
    max_pairs_per_prompt=st.none() | st.integers(1, 4),
    max_length_ratio=st.none() | st.sampled_from([1.0, 1.5, 4.0]),
    match_lengths=st.booleans(),
    seed=st.integers(0, 3),
)


def every_pair(group: list[Rollout], options: PairingOptions) -> list[tuple[Rollout, Rollout]]:
    """All that the options allow, without a heap or a bisection."""
    allowed = []
    for chosen, rejected in combinations(sorted(group, key=lambda one: one.reward, reverse=True), 2):
        gap = chosen.reward - rejected.reward
        lengths = sorted((chosen.answer_chars, rejected.answer_chars))
        if (
            gap > 0
            and gap >= options.min_gap
            and (options.min_chosen_reward is None or chosen.reward >= options.min_chosen_reward)
            and (options.max_length_ratio is None or lengths[1] <= options.max_length_ratio * lengths[0])
            and chosen.answer != rejected.answer
        ):
            allowed.append((chosen, rejected))
    return allowed


def as_tuples(pairs: list[RolloutPair]) -> list[tuple[Rollout, Rollout]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


def gaps(pairs: list[tuple[Rollout, Rollout]]) -> list[float]:
    return sorted((chosen.reward - rejected.reward for chosen, rejected in pairs), reverse=True)


@given(groups, option_sets)
def test_every_pairing_takes_allowed_pairs_in_order_and_none_twice(group, options):
    taken, allowed = as_tuples(select_pairs(group, options)), every_pair(group, options)
    assert taken == [pair for pair in allowed if pair in taken] and len(set(taken)) == len(taken)
    if options.max_pairs_per_prompt is not None:
        assert len(taken) <= options.max_pairs_per_prompt
    assert bool(taken) == bool(allowed) or options.pairing == "best-each"


@given(groups, option_sets)
def test_all_is_every_allowed_pair_and_a_limit_keeps_the_widest(group, options):
    options = replace(options, pairing="all")
    taken, allowed = as_tuples(select_pairs(group, options)), every_pair(group, options)
    if options.max_pairs_per_prompt is None:
        assert taken == allowed
    else:
        assert gaps(taken) == gaps(allowed)[: options.max_pairs_per_prompt]


@given(groups, option_sets)
def test_best_worst_is_one_pair_of_the_widest_gap(group, options):
    options = replace(options, pairing="best-worst", max_pairs_per_prompt=None)
    taken, allowed = as_tuples(select_pairs(group, options)), every_pair(group, options)
    assert gaps(taken) == gaps(allowed)[:1]
    if taken and options.match_lengths:
        widest = [pair for pair in allowed if gaps([pair]) == gaps(taken)]
        assert difference(*taken[0]) == min(difference(*pair) for pair in widest)


def difference(chosen: Rollout, rejected: Rollout) -> int:
    return abs(chosen.answer_chars - rejected.answer_chars)


@given(groups, option_sets)
def test_best_each_sets_the_best_against_every_other(group, options):
    options = replace(options, pairing="best-each", max_pairs_per_prompt=None)
    taken, allowed = as_tuples(select_pairs(group, options)), every_pair(group, options)
    best = max(one.reward for one in group)
    assert all(chosen.reward == best for chosen, _ in taken)
    rejected = [pair[1] for pair in taken]
    assert len(set(rejected)) == len(rejected)
    if options.match_lengths:
        of_best = [pair for pair in allowed if pair[0].reward == best]
        assert set(rejected) == {worse for _, worse in of_best}
        for chosen, worse in taken:
            assert difference(chosen, worse) == min(difference(*pair) for pair in of_best if pair[1] == worse)
    else:
        first = next(one for one in group if one.reward == best)
        assert taken == [pair for pair in allowed if pair[0] == first]


@given(groups, option_sets)
def test_random_draws_as_many_as_asked_by_the_seed_alone(group, options):
    options = replace(options, pairing="random")
    taken, allowed = as_tuples(select_pairs(group, options)), every_pair(group, options)
    assert len(taken) == min(options.max_pairs_per_prompt or 1, len(allowed))
    assert as_tuples(select_pairs(group, options, group=7)) == taken


def test_random_reaches_every_pair_about_equally_often():
    group = [rollout(reward, line=line) for line, reward in enumerate([0.0, 0.5, 0.5, 1.0], start=1)]
    counts: dict[tuple[int, int], int] = {}
    for seed in range(1000):
        (pair,) = select_pairs(group, PairingOptions(pairing="random", seed=seed))
        counts[pair.chosen.line, pair.rejected.line] = counts.get((pair.chosen.line, pair.rejected.line), 0) + 1
    assert set(counts) == {(4, 2), (4, 3), (4, 1), (2, 1), (3, 1)} and min(counts.values()) > 150


@given(groups, option_sets.filter(lambda options: options.pairing != "random"), st.floats(0, 2))
def test_a_greater_min_gap_only_takes_pairs_away(group, options, gap):
    """What the report's table of other gaps rests on."""
    loose = select_pairs(group, replace(options, min_gap=0.0))
    assert select_pairs(group, replace(options, min_gap=gap)) == [pair for pair in loose if pair.gap >= gap]


@given(groups, option_sets)
def test_a_group_without_pairs_has_a_reason_that_is_true(group, options):
    if select_pairs(group, options):
        return
    reason = why_no_pair(group, options)
    assert reason in GROUP_REASONS
    rewards = [one.reward for one in group]
    spread = max(rewards) - min(rewards)
    assert (reason == "one_rollout") == (len(group) == 1)
    assert (reason == "equal_rewards") == (len(group) > 1 and spread == 0)
    assert reason != "small_gap" or 0 < spread < options.min_gap
    if reason == "length_ratio":
        assert every_pair(group, replace(options, max_length_ratio=None))
    if reason == "same_answers":
        assert not every_pair(group, replace(options, max_length_ratio=None))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), rewards, rewards), max_size=20), st.integers(0, 3))
def test_balancing_takes_the_smallest_gaps_of_the_longer_side(rows, seed):
    pairs = [
        RolloutPair(rollout(max(a, b), chars=x, line=2 * n), rollout(min(a, b), chars=y, line=2 * n + 1), n)
        for n, (x, y, a, b) in enumerate(rows)
    ]
    kept, out = balance_lengths(pairs, seed)
    assert sum(pair.longer for pair in kept) == 0
    assert sorted(kept + out, key=lambda pair: pair.group) == pairs
    assert abs(sum(pair.longer for pair in out)) == len(out) == abs(sum(pair.longer for pair in pairs))
    if out:
        rest = [pair.gap for pair in kept if pair.longer == out[0].longer]
        assert max(pair.gap for pair in out) <= min(rest, default=9)
    assert balance_lengths(pairs, seed) == (kept, out)


def test_the_gap_is_compared_as_floats_are():
    """As in the guides' scripts: 0.7 - 0.6 is 0.0999... and below 0.1."""
    group = [rollout(0.7, line=1), rollout(0.6, line=2)]
    assert select_pairs(group, PairingOptions(min_gap=0.1)) == []
    assert why_no_pair(group, PairingOptions(min_gap=0.1)) == "small_gap"
    assert len(select_pairs(group, PairingOptions(min_gap=0.0999))) == 1


@pytest.mark.timeout(20)
def test_ten_thousand_answers_to_one_prompt_are_no_matter():
    group = [rollout(float(line % 7), line=line, chars=line % 100) for line in range(1, 10_001)]
    for pairing in ("best-worst", "best-each", "random", "all"):
        options = PairingOptions(pairing=pairing, max_pairs_per_prompt=1 if pairing == "best-worst" else 50)
        assert len(select_pairs(group, options)) == (1 if pairing == "best-worst" else 50)
