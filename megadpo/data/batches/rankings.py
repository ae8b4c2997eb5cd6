"""What some losses need of the data: rewards of both answers, or rankings.

A ranking is a prompt with a pair for every two of its answers that are not equally good. Its loss (plackett_luce) needs all
of its answers together, so a ranking is never split over packs or global batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.data.batches.groups import PairGroups
from megadpo.data.pairs import Ints, OpenedPairs
from megadpo.data.sources import MOST_PROBLEMS


def first_of_rankings(prompts: Ints) -> Ints:
    """The index of each ranking's first pair. prompts: [N], those of one ranking are next to each other."""
    return np.flatnonzero(np.diff(prompts, prepend=-1))


def ranking_shares(groups: PairGroups, positions: Ints, batch: Ints) -> npt.NDArray[np.float32]:
    """float32 [P] for the pairs at `positions`, which have all pairs of their rankings: (pairs / rankings of the global batch
    `batch`) / pairs with the same chosen answer. With it a mean over the batch's pairs is a mean over its rankings."""
    _, which, counts = np.unique(groups.answers[positions, 0], return_inverse=True, return_counts=True)
    pairs_per_ranking = len(batch) / len(np.unique(groups.prompts[batch]))
    shares: npt.NDArray[np.float32] = (pairs_per_ranking / counts[which]).astype(np.float32)
    return shares


def refuse_no_rewards(dataset: OpenedPairs, loss_type: str) -> None:
    """Raises DataError for rows without the rewards of both answers."""
    without = np.flatnonzero(np.isnan(dataset.reward_gaps))
    if len(without):
        expected = "chosen_reward and rejected_reward (or score_chosen and score_rejected), both numbers"
        fix = f"write them, or choose another loss than {loss_type}: {len(without)} of {len(dataset)} pairs lack them"
        rows = [dataset.source_of(int(dataset.rows[number])) for number in without[:MOST_PROBLEMS]]
        raise DataError([Problem(row, "a pair without rewards", expected, fix) for row in rows])


def refuse_no_rankings(dataset: OpenedPairs, groups: PairGroups, budget_tokens: int) -> None:
    """Raises DataError for prompts whose pairs are no ranking or don't fit into one pack, and for pairs with weights."""
    tokens, _ = groups.totals(np.arange(len(dataset)), groups.prompts, groups.num_prompts, None)
    problems: list[Problem] = []
    for number, positions in enumerate(groups.members()):
        where = dataset.source_of(int(dataset.rows[positions[0]]))
        found = _unranked(groups.answers[positions])
        if found is not None:
            fix = "write each pair of two answers that are not equally good once, the better one as chosen"
            problems.append(Problem(where, found, "every pair of a ranking of this prompt's answers", fix))
        if tokens[number] > budget_tokens:
            fix = f"raise it to {int(tokens.max())} or more: a ranking is not split"
            expected = f"at most policy.sequence_packing.train_mb_tokens, here {budget_tokens}"
            problems.append(Problem(where, f"a ranking of {tokens[number]} packed tokens", expected, fix))
        if len(problems) >= MOST_PROBLEMS:
            break
    for position in np.flatnonzero(dataset.weights != 1)[:MOST_PROBLEMS]:
        fix = "remove the field: a ranking has one loss, not one for each pair"
        where = dataset.source_of(int(dataset.rows[position]))
        problems.append(Problem(where, f"weight {dataset.weights[position]:g}", "no weight", fix))
    if problems:
        raise DataError(problems[:MOST_PROBLEMS])


def _unranked(answers: Ints) -> str | None:
    """Why the pairs int64 [P, 2] of (better, worse) answers are not all pairs of a ranking; None if they are."""
    pairs = {(better, worse) for better, worse in answers.tolist()}
    if len(pairs) < len(answers):
        return "a pair that is there twice"
    names = sorted({answer for pair in pairs for answer in pair})
    worse = {name: sum(better == name for better, _ in pairs) for name in names}
    if pairs == {(a, b) for a in names for b in names if worse[a] > worse[b]}:
        return None
    contradicted = any((b, a) in pairs for a, b in pairs)
    return "pairs that contradict each other" if contradicted else f"{len(pairs)} pairs of {len(names)} answers"
