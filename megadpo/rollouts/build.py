"""Rollouts files -> PAIRS.jsonl, PAIRS.rejected.jsonl and a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megadpo.config.problems import DataError, Problem
from megadpo.files.atomic import write_then_rename
from megadpo.files.jsonl import to_line
from megadpo.rollouts.group import Group, Grouping, group_consecutive, group_rollouts
from megadpo.rollouts.left_out import LeftOut
from megadpo.rollouts.options import BuildOptions, rejected_path
from megadpo.rollouts.pairing import RolloutPair, balance_lengths, select_pairs, why_no_pair
from megadpo.rollouts.read import ReadRollouts, read_rollouts
from megadpo.rollouts.report import BuildReport, pairs_at_gaps
from megadpo.rollouts.row import as_text
from megadpo.rollouts.store import Rollout, TextStore


def build_pairs(
    paths: Sequence[Path], output: Path, options: BuildOptions, on_row: Callable[[], None] = lambda: None
) -> BuildReport:
    """Reads `paths`, and writes `output` and its rejected file. Each is written whole or not at all; `output` only if there
    is at least one pair. Raises DataError with every problem of files that can't be read or grouped."""
    try:
        with (
            TextStore(output.parent) as store,
            write_then_rename(output) as partial,
            write_then_rename(rejected_path(output)) as partial_rejected,
            partial.open("wb") as output_file,
            partial_rejected.open("wb") as rejected_file,
        ):
            left_out = LeftOut(rejected_file)
            read = read_rollouts(paths, store, left_out, options.row, on_row)
            if options.group_by == "task" and options.num_repeats is None:
                _leave_out_without_task(read, left_out)
            if options.num_repeats is not None:
                grouping = group_consecutive(read.rollouts, read.rows, options.num_repeats)
            else:
                grouping = group_rollouts(read.rollouts, options.group_by)
            groups = (
                [_deduplicated(group, left_out) for group in grouping.groups] if options.dedupe else grouping.groups
            )
            pairs = _selected(groups, left_out, options)
            for of_group in _of_groups(pairs) if options.rows == "answers" else ([pair] for pair in pairs):
                make = answers_row if options.rows == "answers" else pair_row
                output_file.write(to_line(make(of_group, store, text=options.row.text)))
            if not pairs:
                partial.unlink()
            return _report(read, grouping, groups, pairs, left_out, options)
    except OSError as error:
        reason, fix = error.strerror or type(error).__name__, "create the folder, or free some space on its disk"
        raise DataError(Problem(str(output), reason, "a folder that can be written to", fix)) from error


def pair_row(pairs: Sequence[RolloutPair], store: TextStore, *, text: bool) -> dict[str, Any]:
    """The row for training of one pair: prompt and answers as messages (with `text`: as strings), `tools` if the prompt has
    any, rewards, and the origin of both answers."""
    (pair,) = pairs
    return {
        **_prompt(pair, store, text=text),
        "chosen": _answer(pair.chosen, store, text=text),
        "rejected": _answer(pair.rejected, store, text=text),
        "reward_gap": pair.gap,
        "chosen_reward": pair.chosen.reward,
        "rejected_reward": pair.rejected.reward,
        "chosen_from": _origin(pair.chosen),
        "rejected_from": _origin(pair.rejected),
        **_task(pair.chosen),
    }


def answers_row(pairs: Sequence[RolloutPair], store: TextStore, *, text: bool) -> dict[str, Any]:
    """The row for training of a group's pairs: the prompt and each answer once, and the pairs by the answers' numbers (the
    format ScoredAnswers)."""
    used = {(one.answer, one.reward): one for pair in pairs for one in (pair.chosen, pair.rejected)}
    ranked = sorted(used.values(), key=lambda one: -one.reward)
    number = {(one.answer, one.reward): n for n, one in enumerate(ranked)}
    kind = "text" if text else "messages"
    answers = [{kind: _answer(one, store, text=text), "score": one.reward, "from": _origin(one)} for one in ranked]
    return {
        **_prompt(pairs[0], store, text=text),
        "answers": answers,
        "pairs": [[number[one.answer, one.reward] for one in (pair.chosen, pair.rejected)] for pair in pairs],
        **_task(pairs[0].chosen),
    }


def _of_groups(pairs: Sequence[RolloutPair]) -> Iterator[list[RolloutPair]]:
    for _, of_group in groupby(pairs, key=lambda pair: pair.group):
        yield list(of_group)


def _prompt(pair: RolloutPair, store: TextStore, *, text: bool) -> dict[str, Any]:
    prompt: dict[str, Any] = store.get(pair.chosen.prompt)
    return {"prompt": as_text(prompt["prompt"])} if text else prompt


def _answer(rollout: Rollout, store: TextStore, *, text: bool) -> Any:
    answer = store.get(rollout.answer)
    return as_text(answer) if text else answer


def _task(rollout: Rollout) -> dict[str, Any]:
    known = {"task_index": rollout.task, "agent": rollout.agent or None}
    return {key: value for key, value in known.items() if value is not None}


def _origin(rollout: Rollout) -> str:
    """file:line, and the rollout's index if the row has one."""
    return rollout.where if rollout.rollout_index is None else f"{rollout.where} (rollout {rollout.rollout_index})"


def _leave_out_without_task(read: ReadRollouts, left_out: LeftOut) -> None:
    for rollout in read.rollouts:
        if rollout.task is None:
            left_out.add(rollout.where, "no_task_index")
    read.rollouts = [rollout for rollout in read.rollouts if rollout.task is not None]


def _deduplicated(group: Group, left_out: LeftOut) -> Group:
    """The group with each answer once, and without answers that have two different rewards."""
    by_answer: dict[int, list[Rollout]] = {}
    for rollout in group.rollouts:
        by_answer.setdefault(rollout.answer, []).append(rollout)
    kept = []
    for same in by_answer.values():
        if len({rollout.reward for rollout in same}) > 1:
            for rollout in same:
                left_out.add(rollout.where, "contradictory_reward", reward=rollout.reward, equal_to=same[0].where)
        else:
            kept.append(same[0])
            for rollout in same[1:]:
                left_out.add(rollout.where, "duplicate", equal_to=same[0].where)
    return replace(group, rollouts=kept, deduplicated=len(group.rollouts) - len(kept))


def _selected(groups: Sequence[Group], left_out: LeftOut, options: BuildOptions) -> list[RolloutPair]:
    """The pairs of all groups, in order. Groups without a pair, and pairs that are removed again, go to `left_out`."""
    pairs: list[RolloutPair] = []
    seen: set[tuple[int, int, int]] = set()
    for number, group in enumerate(groups):
        selected = select_pairs(group.rollouts, options.pairing, number)
        if not selected and group.rollouts:  # --dedupe may have removed all rollouts; it has reported each
            left_out.add(
                group.name,
                _why_no_pair(group, options),
                rollouts=[rollout.where for rollout in group.rollouts],
                rewards=[rollout.reward for rollout in group.rollouts],
            )
        for pair in selected:
            same = (pair.chosen.prompt, pair.chosen.answer, pair.rejected.answer)
            if options.dedupe and same in seen:
                _leave_out_pair(pair, "duplicate_pair", left_out)
                continue
            seen.add(same)
            pairs.append(pair)
    if options.balance_lengths:
        pairs, surplus = balance_lengths(pairs, options.pairing.seed)
        for pair in surplus:
            _leave_out_pair(pair, "length_balance", left_out)
    return pairs


def _why_no_pair(group: Group, options: BuildOptions) -> str:
    reason = why_no_pair(group.rollouts, options.pairing)
    if reason == "one_rollout" and group.deduplicated:
        return "one_answer"
    return "inputs_differ" if reason == "one_rollout" and group.of_split_task else reason


def _leave_out_pair(pair: RolloutPair, reason: str, left_out: LeftOut) -> None:
    left_out.add(f"{pair.chosen.where} over {pair.rejected.where}", reason, reward_gap=pair.gap)


def _report(
    read: ReadRollouts,
    grouping: Grouping,
    groups: Sequence[Group],
    pairs: list[RolloutPair],
    left_out: LeftOut,
    options: BuildOptions,
) -> BuildReport:
    used = [group for group in groups if group.rollouts]
    at_gaps = pairs_at_gaps(used, options.pairing, balance=options.balance_lengths)
    rewards = np.array([rollout.reward for rollout in read.rollouts], dtype=np.float64)
    report = BuildReport(options, read.rows, rewards, grouping, pairs, left_out, at_gaps, read.notes)
    equal = sum(len(group.rollouts) - len({one.answer for one in group.rollouts}) for group in grouping.groups)
    if equal and not options.dedupe:
        report.notes["answers are equal to an earlier one of their group (--dedupe would keep one)"] = equal
    return report
