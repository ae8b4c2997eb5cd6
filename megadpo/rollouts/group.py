"""Groups rollouts by prompt.

In every grouping, all rollouts of a group have the same prompt (and tools), because a pair needs one prompt. A task may
have several prompts, for example a card game that shuffles each time. Rollouts of different agents are never in one
group, because their rewards come from different verifiers.
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
    """In file order, all with the same prompt."""
    of_split_task: bool = False
    """Whether its task also has rollouts with other inputs, in other groups."""
    deduplicated: int = 0
    """Number of rollouts that --dedupe removed."""


@dataclass(frozen=True)
class Grouping:
    groups: list[Group]
    """In the order of their first rollouts."""
    how: str
    """The method, for the report."""
    split_tasks: list[str]
    """A text for each task with several prompts, and so with several groups."""


def group_by_input(rollouts: Iterable[Rollout], how: str = "by input") -> Grouping:
    """A group for each prompt with its tools and agent."""
    groups = _gathered(((rollout.agent, rollout.prompt), rollout) for rollout in rollouts)
    return Grouping([Group(group[0].where, group) for group in groups], how, [])


def group_by_task(rollouts: list[Rollout]) -> Grouping:
    """A group for each task (`_ng_task_index`) and prompt. Every rollout must have a task index."""
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
    return Grouping(named, "by _ng_task_index", split)


def _task_of(rollout: Rollout) -> Hashable:
    """Identifies a task. Tasks of two files may have the same numbers."""
    return rollout.path, rollout.agent, rollout.task


def group_rollouts(rollouts: list[Rollout], by: GroupBy = "auto") -> Grouping:
    """auto: by task if every rollout has a task index, else by input."""
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
    """A group for every `num_repeats` consecutive rows of a file, as NeMo Gym writes them (aabbcc). Unusable rows are
    counted too. `rows`: number of rows of each file; its last group may be shorter. Raises DataError if the rows of a
    group have different inputs: then a row is missing, and all later groups would mix prompts."""
    groups = _gathered(((rollout.path, rollout.position // num_repeats), rollout) for rollout in rollouts)
    problems = [problem for group in groups if (problem := _mixed(group, num_repeats))]
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        if more > 0:
            expected, fix = "none", "correct these first, or use --group-by input"
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
        f"another input or agent than in line {first.line}, which is in the same group of {num_repeats} rows",
        f"{num_repeats} consecutive rows (--num-repeats) with the same input",
        "set --num-repeats to the value with which the rollouts were collected, or use --group-by input",
    )


def _gathered(keyed: Iterable[tuple[Hashable, Rollout]]) -> list[list[Rollout]]:
    gathered: dict[Hashable, list[Rollout]] = {}
    for key, rollout in keyed:
        gathered.setdefault(key, []).append(rollout)
    return list(gathered.values())
