"""Rows of text files: JSONL and CSV (JSON: json_objects.py), plain or compressed with gzip or Zstandard.

They are streamed; files.jsonl.MAX_LINE_BYTES limits the memory.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from megadpo.config.problems import Problem
from megadpo.data.sources import Place, Rows
from megadpo.files import jsonl
from megadpo.files.jsonl import type_name

_HALF_BYTE = re.compile("[\udc80-\udcff]")
"""The characters that errors="surrogateescape" writes for bytes that are not UTF-8."""
_COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_CSV_NUMBERS = ("overall_preference",)


def jsonl_rows(path: Path) -> Rows:
    """One JSON object a line; blank lines are skipped. Raises UNREADABLE."""
    for row, line in enumerate(jsonl.read_lines(path)):
        place = Place(str(path), line.number, row)
        try:
            yield place, jsonl.read_object(line, object_pairs_hook=unique_keys)
        except jsonl.LineError as error:
            yield place, _line_problem(error, line, place)


def csv_rows(path: Path) -> Rows:
    """The first line names the columns. Cells are strings, or JSON lists of objects, such as messages."""
    csv.field_size_limit(jsonl.MAX_LINE_BYTES)  # of the whole process; the default is 131,072 characters
    with jsonl.open_bytes(path) as file:
        # Bytes that are not UTF-8 become surrogates; they are refused below, with their line
        lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        row, line = 0, 1
        while True:
            place = Place(str(path), line, row)
            lines.row_characters = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fix = "quote cells with commas, quotes or line ends, and double the quotes inside"
                yield place, Problem(str(place), f"broken CSV ({error})", "comma-separated cells", fix)
                return
            line = reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if twice := duplicate_columns(str(place), header):
                    yield place, twice[0]
                    return
                continue
            row += 1
            if len(cells) != len(header):
                got, fix = f"{len(cells)} cells", "quote cells that hold commas or line ends"
                yield place, Problem(str(place), got, f"{len(header)} cells, as the first line names", fix)
                continue
            strange = next((byte for cell in cells if (byte := _HALF_BYTE.search(cell))), None)
            if strange is not None:
                yield place, not_utf8(place, ord(strange[0]) - 0xDC00, strange.start())
                continue
            yield place, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}


class _Lines:
    """The lines of a CSV file, for csv.reader, which would hold a row of any length."""

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self.row_characters = 0
        """Read of the present row."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Raises csv.Error for a row that is too long."""
        line = self._file.readline(jsonl.MAX_LINE_BYTES + 1)
        self.row_characters += len(line)
        if self.row_characters > jsonl.MAX_LINE_BYTES:
            raise csv.Error(f"a row of more than {jsonl.MAX_LINE_BYTES // 2**20} MiB")
        if not line:
            raise StopIteration
        return line


def duplicate_columns(where: str, names: list[str]) -> list[Problem]:
    """A problem for each column name that occurs more than once."""
    fix = "rename or remove one of them: only one could be read"
    return [
        Problem(where, f"two columns {name!r}", "columns with different names", fix)
        for name, count in Counter(names).items()
        if count > 1
    ]


def _cell(name: str, cell: str) -> object:
    """The cell's value: JSON lists of objects (messages, completions, tools) and numbers are parsed."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            value = json.loads(cell)
        except (ValueError, RecursionError):
            return cell
        return value if value and all(isinstance(one, dict) for one in value) else cell
    if name in _CSV_NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that occurs twice, because it is unclear which value is meant."""
    read = dict(pairs)
    if len(read) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice!r} twice in one object")
    return read


def broken_json(place: Place, error: Exception | str) -> Problem:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    fix = _json_fix(error) or "close all brackets and quotes, and remove comments and trailing commas"
    return Problem(str(place), f"broken JSON ({reason})", "JSON", fix)


def _json_fix(error: object) -> str | None:
    """For valid JSON that is refused: a key that occurs twice, or a number with thousands of digits."""
    is_valid_syntax = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    return "correct or remove the row" if is_valid_syntax else None


def not_an_object(value: object, place: Place) -> Problem:
    found = f"a JSON {type_name(value)}"
    return Problem(str(place), found, "a JSON object for each pair", "write each pair as an object")


def _line_problem(error: jsonl.LineError, line: jsonl.Line, place: Place) -> Problem:
    """What is wrong with a line of a JSONL file."""
    cause = error.__cause__
    if isinstance(cause, UnicodeDecodeError):
        return not_utf8(place, line.content[cause.start], cause.start, line.content)
    expected = "one JSON object on each line"
    if error.reason == "line_too_long":
        expected = "one pair on each line; no model reads a pair of this length"
        fix = "write each pair on its own line, or remove this one"
    elif error.reason == "not_an_object":
        fix = "write one object on each line (or name the file .json, if it is one big list)"
    else:
        fix = _json_fix(cause) or "write one whole object on each line, or name the file .json if objects span lines"
    return Problem(str(place), str(error), expected, fix)


def not_utf8(place: Place, byte: int, column: int, content: bytes = b"") -> Problem:
    """content: bytes from the beginning of the file, to recognise compressed and UTF-16 files."""
    fix = "convert the file to UTF-8, for instance with iconv -f WINDOWS-1252 -t UTF-8"
    for mark, ending in _COMPRESSED.items():
        if content.startswith(mark):
            fix = f"the file is compressed: its name must end in {ending}"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        fix = "convert the file to UTF-8: iconv -f UTF-16 -t UTF-8"
    return Problem(where=str(place), value=f"the byte 0x{byte:02x} at column {column + 1}", expected="UTF-8", fix=fix)
