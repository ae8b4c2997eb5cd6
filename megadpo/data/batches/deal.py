"""Deals the pairs of a global batch to data-parallel ranks and micro-batches.

Every rank computes the same deal from the lengths and work of the pairs, without communication. Tokens limit a pack
(memory). Ranks are balanced by work (time), because attention makes a token of a long pair cost more (work.py).

With a token budget there are three methods to deal pairs to ranks x m packs. Each starts with the longest pair:
  global  best fit over the packs of all ranks; then the packs are dealt to ranks, those with the most work first
  even    each pair goes to the rank with the least work, into its emptiest pack (LPT: packs of equal size)
  tight   each pair goes to the rank with the least work, into its fullest pack that has space for the pair
`global` gives a sufficient m. Then smaller m are tried as long as one method succeeds. For each m the first balanced
result is taken. If none is balanced, pairs are moved and swapped between the ranks. If that is not enough, m + 1 is
used, provided that it gives balance.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megadpo.data.batches.rebalance import BALANCE, Packs, rebalance

Deal = list[list[list[int]]]
"""[rank][micro-batch][pair] -> position in the global batch."""


def deal_batch(
    lengths: Sequence[int] | np.ndarray,
    *,
    num_ranks: int,
    budget_tokens: int | None = None,
    pairs_per_micro_batch: int | None = None,
    work: Sequence[int] | np.ndarray | None = None,
    micro_batch_multiple: int = 1,
) -> Deal:
    """Deals the positions 0 .. len(lengths) - 1 to ranks and micro-batches, each exactly once.

    work: the cost of each pair, integers >= 0 in any unit; None: its length. With a token budget, the ranks' sums of work
        differ by at most BALANCE, if exchanging a few pairs can achieve it.
    budget_tokens: the most tokens of a pack. pairs_per_micro_batch: this many pairs in each micro-batch, in order, of any
        length. Exactly one of the two is given.
    All ranks get the same number of micro-batches, a multiple of `micro_batch_multiple`. Some are empty if there are too
    few pairs. Deterministic. Raises ValueError for a pair longer than the budget, or if `work` and `lengths` have
    different sizes.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
    if (budget_tokens is None) == (pairs_per_micro_batch is None):
        raise ValueError("give either budget_tokens or pairs_per_micro_batch")
    if micro_batch_multiple < 1:
        raise ValueError(f"micro_batch_multiple must be at least 1, got {micro_batch_multiple}")
    if pairs_per_micro_batch is not None:
        return _by_count(len(lengths), num_ranks, pairs_per_micro_batch, micro_batch_multiple)
    assert budget_tokens is not None
    costs = lengths if work is None else work
    if len(costs) != len(lengths):
        raise ValueError(f"work of {len(costs)} pairs for {len(lengths)} lengths")
    job = _Dealing([int(length) for length in lengths], [int(cost) for cost in costs], num_ranks, budget_tokens)
    return _by_tokens(job, micro_batch_multiple)


def _by_count(num_pairs: int, num_ranks: int, pairs_per_micro_batch: int, multiple: int) -> Deal:
    """Contiguous ranges of positions. Ranks differ by at most one pair."""
    if pairs_per_micro_batch < 1:
        raise ValueError(f"pairs_per_micro_batch must be at least 1, got {pairs_per_micro_batch}")
    bounds = [num_pairs * rank // num_ranks for rank in range(num_ranks + 1)]
    most = max(end - start for start, end in pairwise(bounds))
    micro_batches = _rounded_up(max(1, -(-most // pairs_per_micro_batch)), multiple)
    return [
        [
            list(range(min(first, end), min(first + pairs_per_micro_batch, end)))
            for first in range(start, start + micro_batches * pairs_per_micro_batch, pairs_per_micro_batch)
        ]
        for start, end in pairwise(bounds)
    ]


def _by_tokens(job: _Dealing, multiple: int) -> Deal:
    per_rank = max(1, -(-len(job.best_fit) // job.num_ranks))
    best = _best_packs(job, per_rank)
    assert best is not None, "best fit needed no more packs"
    at_least = max(1, -(-sum(job.lengths) // (job.num_ranks * job.budget)))
    while per_rank > at_least:
        fewer = _best_packs(job, per_rank - 1)
        if fewer is None:
            break
        best, per_rank = fewer, per_rank - 1
    if per_rank % multiple:  # use all packs that must exist, rather than leave some empty
        per_rank = _rounded_up(per_rank, multiple)
        best = _best_packs(job, per_rank)
        assert best is not None, "fewer packs were enough"
    if best.imbalance() > BALANCE:
        more = _best_packs(job, per_rank + multiple)
        if more is not None and more.imbalance() <= BALANCE:
            best = more
    return _in_order(best)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class _Dealing:
    """The pairs of a global batch, longest first, and their best fit decreasing. It uses at most 11/9 of the smallest
    possible number of packs (Johnson 1974)."""

    def __init__(self, lengths: list[int], work: list[int], num_ranks: int, budget: int) -> None:
        longest = max(lengths, default=0)
        if longest > budget:
            raise ValueError(f"a pair of {longest} tokens does not fit into budget_tokens {budget}")
        self.lengths = lengths
        self.work = work
        self.num_ranks = num_ranks
        self.budget = budget
        self.order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
        self.best_fit: list[list[int]] = []
        free = _FreeTokens()
        for position in self.order:
            number = free.take(lengths[position])
            if number is None:
                number = len(self.best_fit)
                self.best_fit.append([])
                free.put(budget - lengths[position], number)
            self.best_fit[number].append(position)

    def empty_packs(self, per_rank: int) -> Packs:
        return Packs.empty(self.lengths, self.work, self.num_ranks, per_rank, self.budget)


class _FreeTokens:
    """Packs by the number of tokens that they can still take. A sorted list of these numbers is fast for any number of
    packs, because there are at most as many different numbers as the budget."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._packs: dict[int, list[int]] = {}

    def put(self, free: int, pack: int) -> None:
        if free not in self._packs:
            insort(self._sizes, free)
            self._packs[free] = []
        self._packs[free].append(pack)

    def take(self, length: int) -> int | None:
        """Finds the pack with the least space for `length` tokens and takes them from it. None if no pack has space."""
        at = bisect_left(self._sizes, length)
        if at == len(self._sizes):
            return None
        free = self._sizes[at]
        pack = self._packs[free].pop()
        if not self._packs[free]:
            del self._packs[free], self._sizes[at]
        self.put(free - length, pack)
        return pack


def _best_packs(job: _Dealing, per_rank: int) -> Packs | None:
    """The pairs on num_ranks x per_rank packs, with the best balance of the three methods. None if no method fits them."""
    found: list[Packs] = []
    for method in (_pack_even, _pack_tight, _pack_global):
        packs = method(job, per_rank)
        if packs is None:
            continue
        if packs.imbalance() <= BALANCE:
            return packs
        found.append(packs)
    for packs in found:
        rebalance(packs)
    return min(found, key=Packs.imbalance, default=None)


def _pack_even(job: _Dealing, per_rank: int) -> Packs | None:
    packs = job.empty_packs(per_rank)
    ranks = [(0, rank) for rank in range(job.num_ranks)]
    emptiest = [[(0, number) for number in range(per_rank)] for _ in ranks]
    for position in job.order:
        length = job.lengths[position]
        rank_work, rank = ranks[0]
        pack_tokens, number = emptiest[rank][0]
        if pack_tokens + length > job.budget:
            return None
        packs.add(rank, number, position)
        heapq.heapreplace(ranks, (rank_work + job.work[position], rank))
        heapq.heapreplace(emptiest[rank], (pack_tokens + length, number))
    return packs


def _pack_tight(job: _Dealing, per_rank: int) -> Packs | None:
    packs = job.empty_packs(per_rank)
    ranks = [(0, rank) for rank in range(job.num_ranks)]  # kept sorted
    free = [_FreeTokens() for _ in ranks]
    for of_rank in free:
        for number in reversed(range(per_rank)):
            of_rank.put(job.budget, number)
    for position in job.order:
        for place, (rank_work, rank) in enumerate(ranks):
            pack = free[rank].take(job.lengths[position])
            if pack is not None:
                packs.add(rank, pack, position)
                del ranks[place]
                insort(ranks, (rank_work + job.work[position], rank))
                break
        else:
            return None
    return packs


def _pack_global(job: _Dealing, per_rank: int) -> Packs | None:
    if len(job.best_fit) > job.num_ranks * per_rank:
        return None
    packs = job.empty_packs(per_rank)
    work = [sum(job.work[position] for position in pack) for pack in job.best_fit]
    ranks = [(0, 0, rank) for rank in range(job.num_ranks)]  # work, packs dealt so far, rank
    for number in sorted(range(len(work)), key=lambda number: (-work[number], number)):
        rank_work, dealt, rank = heapq.heappop(ranks)
        for position in job.best_fit[number]:
            packs.add(rank, dealt, position)
        if dealt + 1 < per_rank:
            heapq.heappush(ranks, (rank_work + work[number], dealt + 1, rank))
    return packs


def _in_order(packs: Packs) -> Deal:
    """Each rank's largest pack first, so that a pack that needs too much memory fails at once. Pairs in batch order."""
    deal = []
    for rank_pairs, rank_tokens in zip(packs.pairs, packs.tokens, strict=True):
        first = [min(pairs, default=-1) for pairs in rank_pairs]
        numbers = sorted(range(len(rank_pairs)), key=lambda number: (-rank_tokens[number], first[number]))
        deal.append([sorted(rank_pairs[number]) for number in numbers])
    return deal
