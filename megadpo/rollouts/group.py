"""Rollouts -> groups of answers to one prompt.

Whatever the grouping, all rollouts of a group have the same prompt (and tools): a pair needs one prompt, and a task of
an environment that deals anew each time (a card game) has many. Rollouts of different agents are never in one group,
because their rewards come from different verifiers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from megadpo.config.problems import DataError, Problem
from megadpo.rollouts.store import Rollout

GroupBy: TypeAlias = Literal["auto", "task", "input"]
_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Group:
    name: str
    """file:line of its first rollout, and its task."""
    rollouts: list[Rollout]
    """In file order; of one prompt."""
    of_split_task: bool = False
    """Whether its task has rollouts with other inputs, which are groups of their own."""
    deduplicated: int = 0
    """Rollouts that --dedupe took out of it."""


@dataclass(frozen=True)
class Grouping:
    groups: list[Group]
    """In the order in which their first rollouts come."""
    how: str
    """For the report."""
    split_tasks: list[str]
    """Tasks that had several prompts and so make several groups: one text for each."""


def group_by_input(rollouts: Iterable[Rollout], how: str = "by input") -> Grouping:
    """One group a prompt, its tools and agent."""
    groups = _gathered(((rollout.agent, rollout.prompt), rollout) for rollout in rollouts)
    return Grouping([Group(group[0].where, group) for group in groups], how, [])


def group_by_task(rollouts: list[Rollout], how: str = "by _ng_task_index") -> Grouping:
    """One group a task (`_ng_task_index`) and prompt. Every rollout must have its task index."""
    groups = _gathered(((rollout.agent, rollout.task, rollout.prompt), rollout) for rollout in rollouts)
    firsts_of_task: dict[Hashable, list[Rollout]] = {}
    for group in groups:
        firsts_of_task.setdefault(_task_of(group[0]), []).append(group[0])
    split = [
        f"{firsts[0].path}: task {firsts[0].task!r} has {len(firsts)} different inputs "
        f"(lines {', '.join(str(first.line) for first in firsts[:3])}{', ...' if len(firsts) > 3 else ''})"
        for firsts in firsts_of_task.values()
        if len(firsts) > 1
    ]
    named = [
        Group(f"{group[0].where} (task {group[0].task!r})", group, len(firsts_of_task[_task_of(group[0])]) > 1)
        for group in groups
    ]
    return Grouping(named, how, split)


def _task_of(rollout: Rollout) -> Hashable:
    """A task of one file: two files' tasks may have the same numbers."""
    return rollout.path, rollout.agent, rollout.task


def group_rollouts(rollouts: list[Rollout], by: GroupBy = "auto") -> Grouping:
    """auto: by task where every rollout has its task index, else by input."""
    if by == "task":
        return group_by_task(rollouts)
    if by == "input":
        return group_by_input(rollouts)
    without = sum(rollout.task is None for rollout in rollouts)
    if not without:
        return group_by_task(rollouts)
    which = "no rollout has" if without == len(rollouts) else f"{without:,} of {len(rollouts):,} rollouts lack"
    return group_by_input(rollouts, f"by input ({which} _ng_task_index)")


def group_consecutive(rollouts: Iterable[Rollout], rows: dict[str, int], num_repeats: int) -> Grouping:
    """Every `num_repeats` consecutive rows of a file, as NeMo Gym writes them (aabbcc). Rows that can't be used keep
    their place. `rows`: rows of each file, of which the last group may be short. Raises DataError where such rows have
    different inputs: one missing row would mix the prompts of every group after it."""
    groups = _gathered(((rollout.path, rollout.position // num_repeats), rollout) for rollout in rollouts)
    problems = [problem for group in groups if (problem := _mixed(group, num_repeats))]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        if more > 0:
            expected, fix = "none", "mend these first, or use --group-by input"
            problems[_MOST_PROBLEMS:] = [Problem("--num-repeats", f"{more:,} more such problems", expected, fix)]
        raise DataError(problems)
    named = [Group(f"{group[0].where} ({num_repeats} rows)", group) for group in groups]
    short = "".join(
        f"; the last group of {path} has {count % num_repeats}" for path, count in rows.items() if count % num_repeats
    )
    return Grouping(named, f"by {num_repeats} consecutive rows{short}", [])


def _mixed(group: list[Rollout], num_repeats: int) -> Problem | None:
    first = group[0]
    other = next((one for one in group if (one.prompt, one.agent) != (first.prompt, first.agent)), None)
    if other is None:
        return None
    return Problem(
        other.where,
        f"another input or agent than line {first.line}, which is of the same {num_repeats} rows",
        f"--num-repeats {num_repeats} consecutive rows of one input",
        "give the num_repeats that the rollouts were collected with, or use --group-by input",
    )


def _gathered(keyed: Iterable[tuple[Hashable, Rollout]]) -> list[list[Rollout]]:
    gathered: dict[Hashable, list[Rollout]] = {}
    for key, rollout in keyed:
        gathered.setdefault(key, []).append(rollout)
    return list(gathered.values())
