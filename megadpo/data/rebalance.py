"""Packs on ranks, and how to even the ranks out without breaking the token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BALANCE = 0.05
"""Data-parallel ranks are balanced if the least loaded has at least 1 - BALANCE of the tokens of the most loaded."""

_MOST_CANDIDATES = 2048  # pairs of a rank that are tried at once: the search is quadratic in them


@dataclass
class Packs:
    """Pairs dealt to ranks and packs."""

    lengths: Sequence[int]
    """Tokens of each pair."""
    budget: int
    """Most tokens in a pack."""
    pairs: list[list[list[int]]]
    """[rank][pack] -> pairs."""
    tokens: list[list[int]]
    """[rank][pack] -> tokens."""

    @classmethod
    def empty(cls, lengths: Sequence[int], num_ranks: int, per_rank: int, budget: int) -> Packs:
        pairs: list[list[list[int]]] = [[[] for _ in range(per_rank)] for _ in range(num_ranks)]
        return cls(lengths, budget, pairs, [[0] * per_rank for _ in range(num_ranks)])

    def add(self, rank: int, pack: int, pair: int) -> None:
        self.pairs[rank][pack].append(pair)
        self.tokens[rank][pack] += self.lengths[pair]

    def remove(self, rank: int, pack: int, pair: int) -> None:
        self.pairs[rank][pack].remove(pair)
        self.tokens[rank][pack] -= self.lengths[pair]

    def rank_tokens(self) -> list[int]:
        return [sum(tokens) for tokens in self.tokens]

    def imbalance(self) -> float:
        """1 - least / most tokens of a rank: 0 is perfect, 1 a rank without work."""
        totals = self.rank_tokens()
        return 1 - min(totals) / max(totals) if max(totals) else 0.0


@dataclass(frozen=True)
class _Exchange:
    """Give `pair` of pack `from_pack` to `to_pack` of another rank, for `back` (None: for nothing)."""

    new_gap: int
    pair: int
    from_pack: int
    to_pack: int
    back: int | None


def rebalance(packs: Packs) -> None:
    """Moves and swaps pairs, in place, from the most loaded rank to less loaded ones until the ranks are balanced or
    no single exchange helps. Packs stay within the budget. Each exchange shrinks the sum of squares of the ranks'
    tokens, so it ends; it is stopped after a few rounds per rank all the same."""
    num_ranks = len(packs.pairs)
    for _ in range(20 * num_ranks):
        if packs.imbalance() <= BALANCE:
            return
        totals = packs.rank_tokens()
        most = max(range(num_ranks), key=lambda rank: (totals[rank], -rank))
        for least in sorted(range(num_ranks), key=lambda rank: (totals[rank], rank)):
            exchange = _best_exchange(packs, most, least, totals[most] - totals[least])
            if exchange is not None:
                _apply(packs, most, least, exchange)
                break
        else:
            return


def _best_exchange(packs: Packs, most: int, least: int, gap: int) -> _Exchange | None:
    """The exchange between two ranks that leaves the smallest gap between them, if one makes it smaller."""
    if gap <= 1:
        return None
    given = _pairs_of(packs, most)
    back: list[tuple[int | None, int]] = [(None, pack) for pack in range(len(packs.pairs[least]))]
    back += _pairs_of(packs, least)
    give_tokens = np.array([packs.lengths[pair] for pair, _ in given], dtype=np.int64)
    back_tokens = np.array([0 if pair is None else packs.lengths[pair] for pair, _ in back], dtype=np.int64)
    room = np.array([packs.budget - packs.tokens[least][pack] for _, pack in back], dtype=np.int64)
    moved = give_tokens[:, None] - back_tokens[None, :]  # [given, back]: tokens that change sides
    new_gap = np.where((moved > 0) & (moved <= room[None, :]), np.abs(gap - 2 * moved), gap)
    if new_gap.size == 0 or new_gap.min() >= gap:
        return None
    row, column = np.unravel_index(int(new_gap.argmin()), new_gap.shape)
    pair, from_pack = given[int(row)]
    returned, to_pack = back[int(column)]
    return _Exchange(int(new_gap.min()), pair, from_pack, to_pack, returned)


def _pairs_of(packs: Packs, rank: int) -> list[tuple[int, int]]:
    """(pair, pack) of a rank, at most _MOST_CANDIDATES of them."""
    every = [(pair, number) for number, pairs in enumerate(packs.pairs[rank]) for pair in pairs]
    return every[:_MOST_CANDIDATES]


def _apply(packs: Packs, most: int, least: int, exchange: _Exchange) -> None:
    packs.remove(most, exchange.from_pack, exchange.pair)
    packs.add(least, exchange.to_pack, exchange.pair)
    if exchange.back is not None:
        packs.remove(least, exchange.to_pack, exchange.back)
        packs.add(most, exchange.from_pack, exchange.back)
