"""Selects pairs of answers in a group.

Rollouts are sorted by decreasing reward; equal rewards stay in file order. A candidate (i, j) has i before j in this order:
i is chosen, j is rejected. Two equal answers, or two equal rewards, never make a pair.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal, TypeAlias

from megadpo.rollouts.store import Rollout

Pairing: TypeAlias = Literal["best-worst", "all", "best-each", "random"]


@dataclass(frozen=True, kw_only=True)
class PairingOptions:
    pairing: Pairing = "best-worst"
    """best-worst: the pair with the largest gap. all: every pair. best-each: the best answer with every other one.
    random: `max_pairs_per_prompt` (default 1) random pairs."""
    min_gap: float = 0.1
    """Smallest chosen minus rejected reward, as floats: 0.7 - 0.6 is less than 0.1. 0: any gap."""
    min_chosen_reward: float | None = None
    max_pairs_per_prompt: int | None = None
    """The pairs with the largest gaps are kept; with `random`, the first ones drawn."""
    max_length_ratio: float | None = None
    """Limit on characters of the longer answer / characters of the shorter one."""
    match_lengths: bool = False
    """With equal gaps, prefer answers of similar length. (Else: the first of the best and the last of the worst.)"""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RolloutPair:
    chosen: Rollout
    rejected: Rollout
    group: int

    @property
    def gap(self) -> float:
        return self.chosen.reward - self.rejected.reward

    @property
    def longer(self) -> int:
        """1 if chosen has more characters than rejected, -1 if fewer, 0 if the numbers are equal."""
        return (self.chosen.answer_chars > self.rejected.answer_chars) - (
            self.chosen.answer_chars < self.rejected.answer_chars
        )


def select_pairs(rollouts: Sequence[Rollout], options: PairingOptions, group: int = 0) -> list[RolloutPair]:
    """The pairs (i, j) of one group, sorted."""
    return _Selection(rollouts, options, group).pairs()


def why_no_pair(rollouts: Sequence[Rollout], options: PairingOptions) -> str:
    """Why `select_pairs` finds no pair in a group: a key of GROUP_REASONS."""
    rewards = [rollout.reward for rollout in rollouts]
    if len(rewards) < 2:
        return "one_rollout"
    gap = max(rewards) - min(rewards)
    if gap == 0:
        return "equal_rewards"
    if gap < options.min_gap:
        return "small_gap"
    if options.min_chosen_reward is not None and max(rewards) < options.min_chosen_reward:
        return "low_chosen_reward"
    if options.max_length_ratio is not None:
        relaxed = PairingOptions(min_gap=options.min_gap, min_chosen_reward=options.min_chosen_reward)
        if select_pairs(rollouts, relaxed):
            return "length_ratio"
    return "same_answers"


class _Selection:
    def __init__(self, rollouts: Sequence[Rollout], options: PairingOptions, group: int) -> None:
        self.options = options
        self.group = group
        self.sorted = sorted(rollouts, key=lambda rollout: -rollout.reward)  # stable
        self.rewards = [rollout.reward for rollout in self.sorted]
        least = options.min_chosen_reward
        self.choosable = len(self.sorted) if least is None else sum(reward >= least for reward in self.rewards)

    def pairs(self) -> list[RolloutPair]:
        options = self.options
        most = options.max_pairs_per_prompt
        if options.pairing == "best-worst":
            candidates, most = self._by_gap(self.choosable), 1
        elif options.pairing == "all":
            candidates = self._by_gap(self.choosable)
        elif options.pairing == "best-each":
            candidates = self._best_each()
        else:
            candidates, most = self._at_random(), most or 1
        taken: list[tuple[int, int]] = []
        for i, j in candidates:
            if most is not None and len(taken) >= most:
                break
            if self._passes(i, j):
                taken.append((i, j))
        return [RolloutPair(self.sorted[i], self.sorted[j], self.group) for i, j in sorted(taken)]

    def _wide_enough(self, i: int, j: int) -> bool:
        gap = self.rewards[i] - self.rewards[j]
        return gap > 0 and gap >= self.options.min_gap

    def _passes(self, i: int, j: int) -> bool:
        """Checks all conditions except gap and chosen reward, which every candidate satisfies."""
        chosen, rejected = self.sorted[i], self.sorted[j]
        if chosen.answer == rejected.answer:
            return False
        ratio = self.options.max_length_ratio
        shorter, longer = sorted((chosen.answer_chars, rejected.answer_chars))
        return ratio is None or longer <= ratio * shorter

    def _by_gap(self, choosable: int) -> Iterator[tuple[int, int]]:
        """Candidates with i < `choosable`, largest gap first. With equal gaps: smallest i, then largest j; or with
        match_lengths, most similar lengths first."""
        if not self.options.match_lengths:
            yield from self._widest_first(choosable)
            return
        same_gap = groupby(self._widest_first(choosable), key=lambda ij: self.rewards[ij[0]] - self.rewards[ij[1]])
        for _, run in same_gap:
            yield from sorted(run, key=self._length_difference)

    def _length_difference(self, ij: tuple[int, int]) -> int:
        return abs(self.sorted[ij[0]].answer_chars - self.sorted[ij[1]].answer_chars)

    def _widest_first(self, choosable: int) -> Iterator[tuple[int, int]]:
        """Merges one sorted sequence for each i, so that the first k of n^2 candidates cost n + k log n."""
        last = len(self.sorted) - 1
        heap = [(self.rewards[last] - self.rewards[i], i, -last) for i in range(min(choosable, last))]
        heapq.heapify(heap)
        while heap:
            i, j = heap[0][1], -heap[0][2]
            if not self._wide_enough(i, j):
                return
            yield i, j
            if j - 1 > i:
                heapq.heapreplace(heap, (self.rewards[j - 1] - self.rewards[i], i, -(j - 1)))
            else:
                heapq.heappop(heap)

    def _best_each(self) -> Iterator[tuple[int, int]]:
        """The best answer with each other one. With match_lengths, of several best ones the most similar in length."""
        if not self.options.match_lengths:
            yield from self._by_gap(min(self.choosable, 1))
            return
        best = sum(reward == self.rewards[0] for reward in self.rewards)
        seen: set[int] = set()
        for i, j in self._by_gap(min(self.choosable, best)):
            if j not in seen and self._passes(i, j):
                seen.add(j)
                yield i, j

    def _at_random(self) -> Iterator[tuple[int, int]]:
        """All candidates in a random order, which depends only on the seed and this group's rollouts."""
        first_j = []  # for each i, the first j with a sufficient gap
        ends = [0]
        count = len(self.sorted)
        for i in range(self.choosable):
            first_j.append(bisect_left(range(count), True, lo=i + 1, key=partial(self._wide_enough, i)))
            ends.append(ends[-1] + count - first_j[i])
        own = [(rollout.reward, rollout.answer_chars) for rollout in self.sorted]
        generator = random.Random(f"{self.options.seed} {own}")
        moved: dict[int, int] = {}  # Fisher-Yates shuffle of range(ends[-1]); stores only numbers that have moved
        for drawn in range(ends[-1]):
            other = generator.randrange(drawn, ends[-1])
            number = moved.get(other, other)
            moved[other] = moved.get(drawn, drawn)
            i = bisect_left(ends, number + 1) - 1
            yield i, first_j[i] + number - ends[i]


def balance_lengths(pairs: Sequence[RolloutPair], seed: int) -> tuple[list[RolloutPair], list[RolloutPair]]:
    """(kept, left out): keeps an equal number of pairs with a longer and with a shorter chosen answer. Of the larger side
    the pairs with the smallest gaps are left out; `seed` decides between equal gaps. The order is kept."""
    longer = [number for number, pair in enumerate(pairs) if pair.longer > 0]
    shorter = [number for number, pair in enumerate(pairs) if pair.longer < 0]
    common = longer if len(longer) > len(shorter) else shorter
    surplus = abs(len(longer) - len(shorter))
    random.Random(seed).shuffle(common)
    out = set(sorted(common, key=lambda number: pairs[number].gap)[:surplus])
    kept = [pair for number, pair in enumerate(pairs) if number not in out]
    return kept, [pair for number, pair in enumerate(pairs) if number in out]
