"""The numbers of a build. show.py prints and draws them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from megadpo.rollouts.group import Group, Grouping
from megadpo.rollouts.left_out import GROUP_REASONS, LeftOut
from megadpo.rollouts.options import BuildOptions
from megadpo.rollouts.pairing import PairingOptions, RolloutPair, balance_lengths, select_pairs

_GAPS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
MOST_BINS = 12
NEARLY_ALL_SAME = 0.9
"""Share of the groups with several rollouts."""
MOST_TASKS = 3


@dataclass(frozen=True)
class Histogram:
    labels: list[str]
    counts: list[int]


@dataclass(frozen=True)
class PairsAtGap:
    min_gap: float
    pairs: int
    prompts: int
    """Groups with at least one pair."""


@dataclass
class BuildReport:
    """The result of one build."""

    options: BuildOptions
    rows: dict[str, int]
    """Rows of each file."""
    rewards: npt.NDArray[np.float64]
    """[R], of the usable rollouts, in file order."""
    grouping: Grouping
    """The groups before --dedupe."""
    pairs: list[RolloutPair]
    """The written pairs, in order."""
    left_out: LeftOut
    at_gaps: list[PairsAtGap]
    """Number of pairs with other values of --min-gap, before --dedupe removes equal pairs of two groups."""
    notes: Counter[str]
    """Text -> number of rollouts."""

    @property
    def gaps(self) -> npt.NDArray[np.float64]:
        """[P] reward gaps of the pairs."""
        return np.array([pair.gap for pair in self.pairs], dtype=np.float64)

    @property
    def length_bias(self) -> tuple[int, int, int]:
        """Number of pairs whose chosen answer has more, equally many, fewer characters."""
        sides = Counter(pair.longer for pair in self.pairs)
        return sides[1], sides[0], sides[-1]

    def counts(self) -> list[tuple[int, str]]:
        """(count, what it counts) for each step of the build."""
        rows, usable, groups = sum(self.rows.values()), len(self.rewards), len(self.grouping.groups)
        files = f"{len(self.rows)} files" if len(self.rows) > 1 else "1 file"
        paired = len({pair.group for pair in self.pairs})
        # groups that lost all rollouts or pairs by --dedupe or --balance-lengths have no entry in left_out
        emptied = groups - paired - sum(self.left_out.counts[reason] for reason in GROUP_REASONS)
        by_parts = f" ({emptied:,} of them lost every rollout or pair)" if emptied else ""
        used = len({rollout.where for pair in self.pairs for rollout in (pair.chosen, pair.rejected)})
        return [
            (rows, f"rows in {files}, {rows - usable:,} of them unusable"),
            (usable, f"rollouts{_range(self.rewards)}"),
            (groups, f"groups {self.grouping.how}{_sizes(self.grouping)}"),
            (paired, f"groups with pairs, {groups - paired:,} without{by_parts}"),
            (len(self.pairs), f"pairs ({self.options}), from {used:,} rollouts"),
        ]

    def remarks(self) -> list[str]:
        """Further notes for the user."""
        remarks = [f"{count:,} {text}" for text, count in self.notes.most_common()]
        several = [group for group in self.grouping.groups if len(group.rollouts) > 1]
        same = sum(len({rollout.answer for rollout in group.rollouts}) == 1 for group in several)
        if len(several) > 1 and same >= NEARLY_ALL_SAME * len(several):
            remarks.append(
                f"{same:,} of {len(several):,} groups have one answer several times: the server doesn't seem to have sampled, "
                "so that a higher temperature changes nothing (docs/collecting.md says what that means for which server)"
            )
        split = self.grouping.split_tasks
        remarks += [f"{text}: each input is a group, because a pair needs one prompt" for text in split[:MOST_TASKS]]
        if len(split) > MOST_TASKS:
            remarks.append(f"{len(split) - MOST_TASKS:,} more tasks have several inputs")
        return remarks


def _range(rewards: npt.NDArray[np.float64]) -> str:
    if not len(rewards):
        return ""
    return f", reward {rewards.mean():.4g} on average, from {rewards.min():.6g} to {rewards.max():.6g}"


def _sizes(grouping: Grouping) -> str:
    sizes = [len(group.rollouts) for group in grouping.groups]
    if not sizes:
        return ""
    least, most = min(sizes), max(sizes)
    return f", of {least:,} rollout{'s' * (least > 1)}" if least == most else f", of {least:,} to {most:,} rollouts"


def histogram(values: npt.NDArray[np.float64]) -> Histogram:
    """If there are few values: the count of each (six digits, so that 0.9 - 0.7 is 0.2). Else ten equal bins."""
    by_label: Counter[str] = Counter()
    for value, count in zip(*np.unique(values, return_counts=True), strict=True):
        by_label[f"{value:.6g}"] += int(count)
        if len(by_label) > MOST_BINS:
            break
    else:
        return Histogram(list(by_label), list(by_label.values()))
    counts, edges = np.histogram(values, bins=10)
    return Histogram([f"{low:.4g} .. {high:.4g}" for low, high in pairwise(edges.tolist())], counts.tolist())


def pairs_at_gaps(groups: Sequence[Group], options: PairingOptions, *, balance: bool) -> list[PairsAtGap]:
    """Number of pairs for several values of min_gap up to the largest gap, including the chosen value."""
    widest = max((_spread(group) for group in groups), default=0.0)
    scale = 10.0 ** math.ceil(math.log10(widest)) if 1 < widest < math.inf else 1.0
    others = {round(gap * by, 12) for gap in _GAPS for by in (1.0, scale)}
    gaps = sorted({options.min_gap, *(gap for gap in others if gap <= widest)})
    # A larger min_gap removes pairs from a selection by gap, but changes a random selection
    if options.pairing != "random":
        pairs = _select(groups, replace(options, min_gap=min(gaps)))
    found = []
    for gap in gaps:
        if options.pairing == "random":
            pairs = _select(groups, replace(options, min_gap=gap))
        else:
            pairs = [pair for pair in pairs if pair.gap >= gap]
        kept = balance_lengths(pairs, options.seed)[0] if balance else pairs
        found.append(PairsAtGap(gap, len(kept), len({pair.group for pair in kept})))
    return found


def _select(groups: Sequence[Group], options: PairingOptions) -> list[RolloutPair]:
    return [pair for number, group in enumerate(groups) for pair in select_pairs(group.rollouts, options, number)]


def _spread(group: Group) -> float:
    rewards = [rollout.reward for rollout in group.rollouts]
    return max(rewards) - min(rewards)
