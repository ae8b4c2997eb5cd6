"""The input file -> tasks. Every problem is found before any request is sent."""

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
"""NeMo Gym's names: rollouts of one task answer one prompt."""
PARAMS = "responses_create_params"

MOST_PROBLEMS = 20
"""A file with more problems than this is not read to its end."""


@dataclass(frozen=True)
class Task:
    """A prompt and how often it is to be answered."""

    index: int
    repeats: int
    row: Body
    """The line of the input file, with the options' parameters over its own."""
    source: str
    """`file:line`."""

    def rollout_row(self, rollout: int, *, add_seed: bool) -> Body:
        """What every row of this task begins with; `_ng_rollout_index` and, if asked for, the seed are the rollout's."""
        params = with_seed(self.row[PARAMS], rollout) if add_seed else self.row[PARAMS]
        return {**self.row, PARAMS: params, TASK_INDEX: self.index, ROLLOUT_INDEX: rollout}


@dataclass(frozen=True)
class Tasks:
    """The tasks in the order of their index, and a fingerprint of the lines they come from."""

    tasks: tuple[Task, ...]
    rows: int
    sha256: str

    @property
    def rollouts(self) -> int:
        """How many answers are to be collected."""
        return sum(task.repeats for task in self.tasks)


def read_tasks(options: CollectOptions) -> Tasks:
    """The tasks of `input_jsonl_fpath`, as ng_collect_rollouts numbers them: a row's own `_ng_task_index`, or else rows
    in the order of the file, where equal lines are one task.

    Raises DataError with up to MOST_PROBLEMS problems, each with file:line: a missing or empty file, broken UTF-8 or
    JSON, a row that is a rollout already, parameters that the endpoint can't be asked."""
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
        raise DataError(Problem(str(path), "a file without rows", "one JSON object a line", fix))
    if reading.problems:
        raise DataError(reading.problems)
    tasks = tuple(reading.tasks[index] for index in sorted(reading.tasks))
    return Tasks(tasks, reading.rows, reading.digest.hexdigest())


class _Reading:
    """What has been read of the input file so far."""

    def __init__(self, options: CollectOptions) -> None:
        self.tasks: dict[int, Task] = {}
        self.problems: list[Problem] = []
        self.rows = 0
        self.digest = hashlib.sha256()
        self._options = options
        self._index_of_line: dict[bytes, int] = {}
        self._has_own_index: bool | None = None  # whether the rows bring _ng_task_index

    def add(self, line: Line, where: str) -> None:
        self.rows += 1
        content = line.content.strip()
        self.digest.update(content + b"\n")
        row = _row(line, where, self.problems)
        if row is not None:
            self._add_row(_prepared(row, where, self._options, self.problems), content, where)
        if len(self.problems) >= MOST_PROBLEMS:
            more = Problem(where, f"{MOST_PROBLEMS} problems so far", "none", "mend these first: the rest was not read")
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
            fix = f"give it to every row, or to none (file order numbers them; this is row {self.rows - 1})"
            self.problems.append(Problem(name, row.get(TASK_INDEX), "in all rows or in none", fix))
        elif before is not None and before.row != row:
            fix = f"give it another index: this one is the task of {before.source}"
            self.problems.append(Problem(name, index, "one prompt for one index", fix))
        else:
            repeats = self._options.num_repeats + (before.repeats if before else 0)
            self.tasks[index] = Task(index, repeats, row, before.source if before else where)


def _row(line: Line, where: str, problems: list[Problem]) -> Body | None:
    expected = "one JSON object a line"
    try:
        row = read_object(line, parse_constant=_refuse_constant)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # a lone half of a surrogate pair can't be sent
    except LineError as error:
        fix = "write one whole JSON object a line, in UTF-8"
        if error.reason == "not_an_object":
            fix = "write each prompt as an object, one a line (JSONL, not one big JSON list)"
        problems.append(Problem(where, str(error), expected, fix))
        return None
    except UnicodeEncodeError as error:
        fix = "write both halves of the surrogate pair, or remove it"
        problems.append(Problem(where, f"the half character {error.object[error.start]!a}", "text of UTF-8", fix))
        return None
    if not isinstance(row.get(PARAMS), dict):
        fix = f'write it as {{"{PARAMS}": {{"input": "your prompt"}}, ...}}; further fields reach the reward'
        problems.append(Problem(f"{where}: {PARAMS}", row.get(PARAMS), "an object with input", fix))
        return None
    taken = sorted({"response", "reward", ROLLOUT_INDEX} & row.keys())
    if taken:
        fix = "give the file of prompts that it was collected from, or take these fields out"
        problems.append(Problem(where, f"{', '.join(taken)}", "a prompt, not a rollout", fix))
        return None
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _prepared(row: Body, where: str, options: CollectOptions, problems: list[Problem]) -> Body:
    """The row with the options in it; what can't be asked is noted."""
    params = text_extra_body({**row[PARAMS], **options.responses_create_params})
    row = {**row, PARAMS: params}
    if options.agent_name is not None:
        row.setdefault("agent_ref", {"name": options.agent_name})
    index = row.get(TASK_INDEX)
    if TASK_INDEX in row and (type(index) is not int or index < 0):
        problems.append(Problem(f"{where}: {TASK_INDEX}", index, "a whole number >= 0", "mend it or take it out"))
    findings = Findings(where, problems)
    before = len(problems)
    check_params(params, findings)
    if len(problems) == before:
        request_body(params, options.policy_api, findings)
    return row
