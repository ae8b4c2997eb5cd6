"""The order of an epoch with a fixed share of each of several data sets.

An epoch has as many pairs as all sets together. Each set gives its share of them, exact up to one pair, spread evenly over
the epoch. A set's pairs are taken in passes: each pair once before any is taken again. A pass continues in the next epoch.
So the order of an epoch depends only on (seed, epoch), and a run can resume in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megadpo.config.problems import DataError, Problem
from megadpo.data.chosen import ChosenPairs
from megadpo.data.pairs import Ints


def refuse_empty_sets(pairs: ChosenPairs) -> None:
    """Raises DataError for sets without pairs, which can't give their share. (All of their prompts may be held out.)"""
    sizes = np.bincount(pairs.of_set, minlength=len(pairs.sets))
    empty = [one.report.path for one, size in zip(pairs.sets, sizes, strict=True) if not size]
    if empty:
        fix = "remove the set from data.train_data_path, or lower data.holdout"
        raise DataError(
            [Problem(path, "no pairs to train on", "one at least, to give its share", fix) for path in empty]
        )


def counts_of(shares: Sequence[float], total: int) -> Ints:
    """int64 [sets]: `total` pairs divided by the shares, whose sum is 1. Pairs left by rounding down go to the sets with the
    largest remainders."""
    exact = np.asarray(shares) * total
    counts: Ints = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[most] += 1
    return counts


def mixed_order(
    of_set: Ints, shares: Sequence[float], total: int, *, epoch: int, seed: int | None, prompts: Ints | None
) -> Ints:
    """int64 [total]: positions in the order of the epoch.

    of_set: int64 [N], the set of each position. seed: for the order of each pass; None: the data sets' own order. prompts:
    int64 [N] if pairs with the same prompt must be consecutive within their set.
    """
    counts = counts_of(shares, total)
    drawn, times = [], []
    for number, count in enumerate(counts.tolist()):
        positions = np.flatnonzero(of_set == number)
        size, first = len(positions), epoch * count
        start = first // size
        passes = [
            _one_pass(positions, None if seed is None else [seed, again, number], prompts)
            for again in range(start, -(-(first + count) // size))
        ]
        drawn.append(np.concatenate([positions[:0], *passes])[first - start * size :][:count])
        times.append((np.arange(count) + 0.5) / max(count, 1))
    order: Ints = np.concatenate(drawn)[np.argsort(np.concatenate(times), kind="stable")]
    return order


def _one_pass(positions: Ints, seed: Sequence[int] | None, prompts: Ints | None) -> Ints:
    order: Ints = positions
    if seed is None:
        return order
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(seed))))
    if prompts is None:
        order = generator.permutation(positions)
        return order
    distinct, which = np.unique(prompts[positions], return_inverse=True)
    order = positions[np.argsort(generator.permutation(len(distinct))[which], kind="stable")]
    return order
