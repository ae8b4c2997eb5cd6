"""Packs on ranks, and moving pairs between ranks to balance their work within the token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

BALANCE = 0.02
"""Data-parallel ranks are balanced if least work / most work is at least 1 - BALANCE."""

_MOST_CANDIDATES = 1024  # on each side of an exchange; the search is quadratic in them


@dataclass
class Packs:
    """Pairs dealt to ranks and packs. Tokens limit a pack; work balances the ranks."""

    lengths: Sequence[int]
    """Tokens of each pair."""
    work: Sequence[int]
    """Work of each pair."""
    budget: int
    """Most tokens in a pack."""
    pairs: list[list[list[int]]]
    """[rank][pack] -> pairs."""
    tokens: list[list[int]]
    """[rank][pack] -> tokens."""
    rank_work: list[int]
    """[rank] -> work."""

    @classmethod
    def empty(cls, lengths: Sequence[int], work: Sequence[int], num_ranks: int, per_rank: int, budget: int) -> Packs:
        pairs: list[list[list[int]]] = [[[] for _ in range(per_rank)] for _ in range(num_ranks)]
        return cls(lengths, work, budget, pairs, [[0] * per_rank for _ in range(num_ranks)], [0] * num_ranks)

    def add(self, rank: int, pack: int, pair: int) -> None:
        self.pairs[rank][pack].append(pair)
        self.tokens[rank][pack] += self.lengths[pair]
        self.rank_work[rank] += self.work[pair]

    def remove(self, rank: int, pack: int, pair: int) -> None:
        self.pairs[rank][pack].remove(pair)
        self.tokens[rank][pack] -= self.lengths[pair]
        self.rank_work[rank] -= self.work[pair]

    def imbalance(self) -> float:
        """1 - (least / most work of a rank). 0: perfect balance; 1: some rank has no work."""
        return 1 - min(self.rank_work) / max(self.rank_work) if max(self.rank_work) else 0.0


@dataclass(frozen=True)
class _Bundle:
    """Zero, one or two pairs of one pack."""

    pairs: tuple[int, ...]
    pack: int


def rebalance(packs: Packs) -> None:
    """Moves and swaps one or two pairs at a time between ranks, in place, until the ranks are balanced or no single
    exchange helps. Packs stay within the budget. Each exchange makes the work of two ranks more equal, so the search
    ends; in any case it stops after 20 rounds for each rank."""
    num_ranks = len(packs.pairs)
    for _ in range(20 * num_ranks):
        if packs.imbalance() <= BALANCE:
            return
        by_work = sorted(range(num_ranks), key=lambda rank: (packs.rank_work[rank], rank))
        # the rank with the most work with each other rank; then the rank with the least work with each other rank
        tries = [(by_work[-1], rank) for rank in by_work[:-1]] + [(rank, by_work[0]) for rank in by_work[:0:-1]]
        if not any(_exchange(packs, most, least) for most, least in tries):
            return


def _exchange(packs: Packs, most: int, least: int) -> bool:
    """Makes the exchange between two ranks that gives the smallest difference in work, if that is an improvement."""
    gap = packs.rank_work[most] - packs.rank_work[least]
    if gap <= 1:
        return False
    given, back = _groups(packs, most), _groups(packs, least)
    give_tokens, give_work, give_room = _sizes(packs, most, given)
    back_tokens, back_work, back_room = _sizes(packs, least, back)
    tokens = give_tokens[:, None] - back_tokens[None, :]  # [given, back]: net tokens that `least` gets
    work = give_work[:, None] - back_work[None, :]
    fits = (tokens <= back_room[None, :]) & (-tokens <= give_room[:, None])
    new_gap = np.where(fits & (work > 0), np.abs(gap - 2 * work), gap)
    row, column = np.unravel_index(int(new_gap.argmin()), new_gap.shape)
    if new_gap[row, column] >= gap:
        return False
    there, here = given[int(row)], back[int(column)]
    for pair in there.pairs:
        packs.remove(most, there.pack, pair)
        packs.add(least, here.pack, pair)
    for pair in here.pairs:
        packs.remove(least, here.pack, pair)
        packs.add(most, there.pack, pair)
    return True


def _groups(packs: Packs, rank: int) -> list[_Bundle]:
    """What a rank can give: nothing, one pair, or two pairs of one pack. At most _MOST_CANDIDATES, in this order."""
    every = [_Bundle((), number) for number in range(len(packs.pairs[rank]))]
    for size in (1, 2):
        for number, pairs in enumerate(packs.pairs[rank]):
            if len(every) >= _MOST_CANDIDATES:
                return every[:_MOST_CANDIDATES]
            every += [_Bundle(some, number) for some in combinations(pairs, size)]
    return every[:_MOST_CANDIDATES]


def _sizes(
    packs: Packs, rank: int, groups: list[_Bundle]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tokens and work of each group, and the room in its pack."""
    tokens = [sum(packs.lengths[pair] for pair in group.pairs) for group in groups]
    work = [sum(packs.work[pair] for pair in group.pairs) for group in groups]
    room = [packs.budget - packs.tokens[rank][group.pack] for group in groups]
    return np.array(tokens, dtype=np.int64), np.array(work, dtype=np.int64), np.array(room, dtype=np.int64)
