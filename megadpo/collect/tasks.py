"""Reads the input file into tasks. All problems are found before the first request is sent."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from megadpo.collect.endpoints import request_body
from megadpo.collect.options import CollectOptions
from megadpo.collect.parameters import Body, Findings, check_params, text_extra_body, with_seed
from megadpo.config.problems import DataError, Problem
from megadpo.files.jsonl import UNREADABLE, Line, LineError, read_lines, read_object

TASK_INDEX, ROLLOUT_INDEX = "_ng_task_index", "_ng_rollout_index"
"""NeMo Gym's names. Rollouts of one task have the same prompt."""
PARAMS = "responses_create_params"

MOST_PROBLEMS = 20
"""After this many problems, reading stops."""


@dataclass(frozen=True)
class Task:
    """A prompt, and the number of its answers."""

    index: int
    repeats: int
    row: Body
    """The line of the input file, with the parameters of the options."""
    source: str
    """`file:line`."""

    def rollout_row(self, rollout: int, *, add_seed: bool) -> Body:
        """The row of one rollout, without response: with its `_ng_rollout_index` and, if wanted, its seed."""
        params = with_seed(self.row[PARAMS], rollout) if add_seed else self.row[PARAMS]
        return {**self.row, PARAMS: params, TASK_INDEX: self.index, ROLLOUT_INDEX: rollout}


@dataclass(frozen=True)
class Tasks:
    """The tasks, sorted by index, and a hash of their lines."""

    tasks: tuple[Task, ...]
    rows: int
    sha256: str

    @property
    def rollouts(self) -> int:
        """Number of answers to collect."""
        return sum(task.repeats for task in self.tasks)


def read_tasks(options: CollectOptions) -> Tasks:
    """The tasks of `input_jsonl_fpath`, numbered as by ng_collect_rollouts: by the rows' `_ng_task_index`, or else in the
    order of the file; equal lines are one task.

    Raises DataError with up to MOST_PROBLEMS problems, each with file:line: a missing or empty file, broken UTF-8 or
    JSON, a row that is a rollout already, parameters that the endpoint doesn't have."""
    path = Path(options.input_jsonl_fpath)
    reading = _Reading(options)
    try:
        for line in itertools.islice(read_lines(path), options.limit):
            reading.add(line, f"{path}:{line.number}")
            if len(reading.problems) >= MOST_PROBLEMS:
                break
    except UNREADABLE as error:
        value = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DataError(Problem("input_jsonl_fpath", f"{path}: {value}", "a JSONL file", "check the path")) from error
    if reading.rows == 0:
        fix = "write prompts to it, or name another file"
        raise DataError(Problem(str(path), "a file without rows", "one JSON object on each line", fix))
    if reading.problems:
        raise DataError(reading.problems)
    tasks = tuple(reading.tasks[index] for index in sorted(reading.tasks))
    return Tasks(tasks, reading.rows, reading.digest.hexdigest())


class _Reading:
    """The part of the input file that has been read."""

    def __init__(self, options: CollectOptions) -> None:
        self.tasks: dict[int, Task] = {}
        self.problems: list[Problem] = []
        self.rows = 0
        self.digest = hashlib.sha256()
        self._options = options
        self._index_of_line: dict[bytes, int] = {}
        self._has_own_index: bool | None = None  # whether the rows have _ng_task_index

    def add(self, line: Line, where: str) -> None:
        self.rows += 1
        content = line.content.strip()
        self.digest.update(content + b"\n")
        row = _row(line, where, self.problems)
        if row is not None:
            self._add_row(_prepared(row, where, self._options, self.problems), content, where)
        if len(self.problems) >= MOST_PROBLEMS:
            more = Problem(
                where, f"{MOST_PROBLEMS} problems so far", "none", "correct these first: the rest was not read"
            )
            self.problems[MOST_PROBLEMS:] = [more]

    def _add_row(self, row: Body, content: bytes, where: str) -> None:
        name = f"{where}: {TASK_INDEX}"
        is_mixed = self._has_own_index not in (None, TASK_INDEX in row)
        self._has_own_index = TASK_INDEX in row
        index = row.get(TASK_INDEX)
        if type(index) is not int:
            index = self._index_of_line.setdefault(hashlib.sha256(content).digest(), len(self._index_of_line))
        before = self.tasks.get(index)
        if is_mixed:
            fix = f"give it to every row, or to none (the file's order is then the number; this is row {self.rows - 1})"
            self.problems.append(Problem(name, row.get(TASK_INDEX), "in all rows or in none", fix))
        elif before is not None and before.row != row:
            fix = f"give it another index: {before.source} has this one"
            self.problems.append(Problem(name, index, "one prompt for one index", fix))
        else:
            repeats = self._options.num_repeats + (before.repeats if before else 0)
            self.tasks[index] = Task(index, repeats, row, before.source if before else where)


def _row(line: Line, where: str, problems: list[Problem]) -> Body | None:
    expected = "one JSON object on each line"
    try:
        row = read_object(line, parse_constant=_refuse_constant)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair can't be sent
    except LineError as error:
        fix = "write one whole JSON object on each line, in UTF-8"
        if error.reason == "not_an_object":
            fix = "write one object on each line (JSONL, not one big JSON list)"
        problems.append(Problem(where, str(error), expected, fix))
        return None
    except UnicodeEncodeError as error:
        fix = "write both halves of the surrogate pair, or remove it"
        problems.append(Problem(where, f"half a surrogate pair, {error.object[error.start]!a}", "UTF-8 text", fix))
        return None
    if not isinstance(row.get(PARAMS), dict):
        fix = f'write it as {{"{PARAMS}": {{"input": "your prompt"}}, ...}}; the reward also gets other fields'
        problems.append(Problem(f"{where}: {PARAMS}", row.get(PARAMS), "an object with input", fix))
        return None
    taken = sorted({"response", "reward", ROLLOUT_INDEX} & row.keys())
    if taken:
        fix = "give the file of prompts, not of rollouts, or remove these fields"
        problems.append(Problem(where, f"{', '.join(taken)}", "a prompt, not a rollout", fix))
        return None
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _prepared(row: Body, where: str, options: CollectOptions, problems: list[Problem]) -> Body:
    """The row with the options' parameters. Problems are added to `problems`."""
    params = text_extra_body({**row[PARAMS], **options.responses_create_params})
    row = {**row, PARAMS: params}
    if options.agent_name is not None:
        row.setdefault("agent_ref", {"name": options.agent_name})
    index = row.get(TASK_INDEX)
    if TASK_INDEX in row and (type(index) is not int or index < 0):
        problems.append(Problem(f"{where}: {TASK_INDEX}", index, "a whole number >= 0", "correct or remove it"))
    findings = Findings(where, problems)
    before = len(problems)
    check_params(params, findings)
    if len(problems) == before:
        request_body(params, options.policy_api, findings)
    return row
