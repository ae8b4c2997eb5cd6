"""Reads rollouts files. Unusable rows are left out, each with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megadpo.config.problems import DataError, Problem
from megadpo.files.jsonl import UNREADABLE, Line, LineError, read_lines, read_object
from megadpo.messages.chat import MessageError
from megadpo.rollouts.left_out import LeftOut, Unusable
from megadpo.rollouts.row import Generation, ParsedRow, RowOptions, answer_chars, parse_row
from megadpo.rollouts.store import Rollout, TextStore


@dataclass
class ReadRollouts:
    """The rollouts of all files, in file order."""

    rollouts: list[Rollout] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    """File -> number of rows, with unusable ones."""
    notes: Counter[str] = field(default_factory=Counter)
    """Text -> number of rollouts that were changed in this way."""


def read_rollouts(
    paths: Sequence[Path],
    store: TextStore,
    left_out: LeftOut,
    options: RowOptions,
    on_row: Callable[[], None] = lambda: None,
) -> ReadRollouts:
    """The rollouts of all files. Raises DataError for files that can't be read or have no rows."""
    done = ReadRollouts()
    problems: list[Problem] = []
    for path in paths:
        try:
            _read_file(path, store, left_out, options, done, on_row)
        except DataError as error:
            problems.extend(error.problems)
    if problems:
        raise DataError(problems)
    return done


def _read_file(
    path: Path, store: TextStore, left_out: LeftOut, options: RowOptions, done: ReadRollouts, on_row: Callable[[], None]
) -> None:
    generation: Generation | None = None
    rows = 0
    for line in _lines(path):
        where = f"{path}:{line.number}"
        try:
            parsed = parse_row(read_object(line), options)
            generation = generation or parsed.generation
            if parsed.generation != generation:
                raise Unusable(
                    "mixed_generations", f"{parsed.generation}, in a file that began with rows of {generation}"
                )
            done.rollouts.append(_kept(parsed, store, str(path), line.number, rows))
            done.notes.update(set(parsed.notes))
        except (LineError, MessageError, Unusable) as error:
            left_out.add_row(where, error.reason, str(error), line.content)
        rows += 1
        on_row()
    done.rows[str(path)] = rows
    if rows == 0:
        fix = "collect rollouts, or leave the file out"
        raise DataError(Problem(str(path), "a file without rows", "one rollout on each line", fix))


def _lines(path: Path) -> Iterator[Line]:
    """The lines of a file. Raises DataError if it can't be read to its end."""
    number = 0
    try:
        for line in read_lines(path):
            number = line.number
            yield line
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        expected = "a rollouts file that can be read to its end (.jsonl, .jsonl.gz or .jsonl.zst)"
        where = f"{path}:{number}" if number else str(path)
        raise DataError(Problem(where, reason, expected, "check the path, or copy the file again")) from error


def _kept(parsed: ParsedRow, store: TextStore, path: str, line: int, position: int) -> Rollout:
    return Rollout(
        path=path,
        line=line,
        position=position,
        reward=parsed.reward,
        prompt=store.add_prompt(parsed.prompt, parsed.tools),
        answer=store.add_answer(parsed.answer),
        answer_chars=answer_chars(parsed.answer),
        task=parsed.task,
        rollout_index=parsed.rollout_index,
        agent=parsed.agent,
    )
