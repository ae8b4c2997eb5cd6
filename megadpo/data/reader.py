"""Data files -> PreferencePairs. Every problem of a file is found before any is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megadpo.config.problems import DataError, Problem
from megadpo.data.formats import FieldKeys, Place, RowFormat, recognise
from megadpo.data.pairs import PreferencePair

MOST_PROBLEMS = 20
"""A file with more problems than this is not read to its end."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_pairs(path: str | Path, keys: FieldKeys | None = None) -> list[PreferencePair]:
    """The pairs of a JSONL file, in file order; blank lines are skipped.

    The first good row decides the format; a row of another one is a problem. Raises DataError with up to
    MOST_PROBLEMS problems, each with file:line: a missing, unreadable or empty file, broken UTF-8 or JSON, a row that
    its format refuses."""
    keys = keys or FieldKeys()
    path = Path(path)
    pairs: list[PreferencePair] = []
    problems: list[Problem] = []
    row_format: RowFormat | None = None
    rows = 0
    try:
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if line_number == 1:
                    line = line.removeprefix(_BYTE_ORDER_MARK)
                if not line.strip():
                    continue
                place = Place(str(path), line_number, rows)
                rows += 1
                row = _row(line, place)
                if isinstance(row, Problem):
                    problems.append(row)
                else:
                    found_format = recognise(row, keys)
                    row_format = row_format or found_format
                    read = row_format.read(row, keys, place)
                    if isinstance(read, PreferencePair):
                        pairs.append(read)
                    else:
                        problems.extend(read)
                if len(problems) >= MOST_PROBLEMS:
                    raise DataError([*problems[:MOST_PROBLEMS], _too_many(place)])
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    if rows == 0:
        raise DataError(
            Problem(
                where=str(path),
                value="a file without rows",
                expected="one JSON object a line",
                fix="write pairs to it, or name another file",
            )
        )
    if problems:
        raise DataError(problems)
    return pairs


def iterate_pairs(path: str | Path, keys: FieldKeys | None = None) -> Iterator[PreferencePair]:
    """As read_pairs, one at a time; the problems are raised at the end."""
    yield from read_pairs(path, keys)


def _row(line: bytes, place: Place) -> dict[str, object] | Problem:
    """The line as a JSON object, or what is wrong with it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem(
            where=str(place),
            value=f"the byte 0x{line[error.start]:02x} at column {error.start + 1}",
            expected="UTF-8",
            fix="write the file in UTF-8, for instance with iconv -t UTF-8",
        )
    except (ValueError, RecursionError) as error:
        said = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        return Problem(
            where=str(place),
            value=f"broken JSON ({said})",
            expected="one JSON object a line",
            fix="put the whole object on this line and close what it opens",
        )
    if not isinstance(row, dict):
        return Problem(
            where=str(place),
            value=f"a JSON {type(row).__name__}",
            expected="one JSON object a line",
            fix="write each pair as an object, one a line (JSONL, not one big JSON list)",
        )
    return row


def _too_many(place: Place) -> Problem:
    return Problem(
        where=str(place),
        value=f"{MOST_PROBLEMS} problems so far",
        expected="none",
        fix="mend these first: the rest of the file was not read",
    )


def _unreadable(path: Path, error: OSError) -> Problem:
    return Problem(
        where=str(path),
        value=error.strerror or type(error).__name__,
        expected="a JSONL file that can be read",
        fix="check data.train_data_path and data.val_data_paths: a path is taken from where the run was started",
    )
