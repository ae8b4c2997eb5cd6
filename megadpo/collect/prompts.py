"""The input file -> tasks. Every problem is found before any request is sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadpo.collect.chat import chat_body
from megadpo.collect.options import CollectOptions, PolicyApi
from megadpo.collect.parameters import (
    Body,
    Findings,
    Params,
    check_params,
    responses_body,
    text_extra_body,
    with_seed,
)
from megadpo.config.problems import DataError, Problem

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


def request_body(params: Params, api: PolicyApi, findings: Findings) -> Body:
    """What is sent to the endpoint, without `model`; problems are noted in `findings`."""
    return chat_body(params, findings) if api == "chat_completions" else responses_body(params, findings)


def read_tasks(options: CollectOptions) -> Tasks:
    """The tasks of `input_jsonl_fpath`, as ng_collect_rollouts numbers them: a row's own `_ng_task_index`, or else rows
    in the order of the file, where equal lines are one task.

    Raises DataError with up to MOST_PROBLEMS problems, each with file:line: a missing or empty file, broken UTF-8 or
    JSON, a row that is a rollout already, parameters that the endpoint can't be asked."""
    path = Path(options.input_jsonl_fpath)
    problems: list[Problem] = []
    digest = hashlib.sha256()
    found: dict[int, Task] = {}
    of_line: dict[bytes, int] = {}
    own_index: bool | None = None
    rows = 0
    for where, line in _lines(path):
        if rows == options.limit:
            break
        rows += 1
        digest.update(line + b"\n")
        row = _row(line, where, problems)
        if row is not None:
            row = _prepared(row, where, options, problems)
            index, mixed = _index(row, line, of_line), own_index not in (None, TASK_INDEX in row)
            own_index = TASK_INDEX in row
            before = found.get(index)
            if mixed:
                fix = f"give it to every row, or to none (file order numbers them; this is row {rows - 1})"
                problems.append(Problem(f"{where}: {TASK_INDEX}", row.get(TASK_INDEX), "in all rows or in none", fix))
            elif before is not None and before.row != row:
                fix = f"give it another index: this one is the task of {before.source}"
                problems.append(Problem(f"{where}: {TASK_INDEX}", index, "one prompt for one index", fix))
            else:
                repeats = options.num_repeats + (before.repeats if before else 0)
                found[index] = Task(index, repeats, row, before.source if before else where)
        if len(problems) >= MOST_PROBLEMS:
            fix = "mend these first: the rest of the file was not read"
            problems = [*problems[:MOST_PROBLEMS], Problem(where, f"{MOST_PROBLEMS} problems so far", "none", fix)]
            break
    if rows == 0:
        fix = "write prompts to it, or name another file"
        problems.append(Problem(str(path), "a file without rows", "one JSON object a line", fix))
    if problems:
        raise DataError(problems)
    return Tasks(tuple(found[index] for index in sorted(found)), rows, digest.hexdigest())


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(`file:line`, line without its end) of every line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield f"{path}:{number}", line.strip()
    except OSError as error:
        value = error.strerror or type(error).__name__
        raise DataError(Problem("input_jsonl_fpath", f"{path}: {value}", "a JSONL file", "check the path")) from error


def _row(line: bytes, where: str, problems: list[Problem]) -> Body | None:
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(row, ensure_ascii=False).encode("utf-8")  # a lone half of a surrogate pair can't be sent
    except (ValueError, RecursionError) as error:
        fix = "write one whole JSON object a line, in UTF-8"
        problems.append(Problem(where, f"broken JSON ({str(error)[:150]})", "one JSON object a line", fix))
        return None
    if not isinstance(row, dict):
        fix = "write each prompt as an object, one a line (JSONL, not one big JSON list)"
        problems.append(Problem(where, f"a JSON {type(row).__name__}", "one JSON object a line", fix))
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


def _index(row: Body, line: bytes, of_line: dict[bytes, int]) -> int:
    if type(row.get(TASK_INDEX)) is int:
        index: int = row[TASK_INDEX]
        return index
    return of_line.setdefault(hashlib.sha256(line).digest(), len(of_line))


def to_line(row: Any) -> bytes:
    """A row as one line of JSON, with its end. UTF-8 where the text can be written so, `\\u` escapes where not."""
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode("ascii") + b"\n"
