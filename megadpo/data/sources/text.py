"""Rows of text files: JSONL, JSON and CSV, plain or compressed with gzip or Zstandard.

JSONL and CSV stream, in memory bounded by MAX_LINE_BYTES; a .json file is held whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from megadpo.config.problems import Problem
from megadpo.data.sources import Place, Rows, type_name

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is refused unread: it is a file without line ends, or no pair that a model could train on."""

_ZSTD_PIECE_BYTES = 2**14
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_HALF_BYTE = re.compile("[\udc80-\udcff]")
"""What errors="surrogateescape" makes of a byte that is no UTF-8."""
_COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_CSV_NUMBERS = ("overall_preference",)


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, uncompressed where its name ends in .gz or .zst. Raises OSError; a damaged compressed file
    raises EOFError, OSError, zlib.error or zstandard.ZstdError when it is read."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if name.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path)))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """The content of Zstandard frames end to end. zstandard's own reader takes a frame that is cut off for whole."""

    def __init__(self, path: Path) -> None:
        import zstandard  # a tenth of a second that other files need not wait for

        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._is_inside = False
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError for a frame without its end, zstandard.ZstdError for a damaged one."""
        while not self._content:
            piece = self._frame.unused_data if self._frame.eof else b""
            piece = piece or self._file.read(_ZSTD_PIECE_BYTES)
            if self._frame.eof:
                self._frame, self._is_inside = self._new_frame(), False
            if not piece:
                if self._is_inside:
                    raise EOFError("a Zstandard frame without its end")
                return 0
            self._content, self._is_inside = memoryview(self._frame.decompress(piece)), True
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def jsonl_rows(path: Path) -> Rows:
    """One JSON object a line; blank lines are skipped."""
    row = 0
    with open_bytes(path) as file:
        for number, line in enumerate(_lines(file), start=1):
            place = Place(str(path), number, row)
            if line is None:
                row += 1
                yield place, _too_long_a_line(place)
                continue
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if line.strip():
                row += 1
                yield place, _json_row(line, place)


def json_rows(path: Path) -> Rows:
    """A list of objects, or objects one after the other, each over as many lines as it likes. A row's line is that on
    which it begins. Nothing after broken JSON can be read."""
    with open_bytes(path) as file:
        content = file.read().removeprefix(_BYTE_ORDER_MARK)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        place = Place(str(path), content.count(b"\n", 0, error.start) + 1, 0)
        yield place, _not_utf8(place, content[error.start], error.start - start, content)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    position, line, counted, row, in_list = 0, 1, 0, 0, False
    after_value = False
    while True:
        position = _end_of_space(text, position)
        if position == len(text) and not in_list:
            return
        line, counted = line + text.count("\n", counted, position), position
        place = Place(str(path), line, row)
        character = text[position : position + 1]
        if not in_list and character == "[":
            position, in_list, after_value = position + 1, True, False
        elif in_list and character == "]":
            position, in_list = position + 1, False
        elif in_list and after_value and character == ",":
            position, after_value = position + 1, False
        elif in_list and after_value:
            yield place, _broken_json(place, "',' or ']' is missing")
            return
        else:
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError):
                    place = Place(str(path), error.lineno, row)
                yield place, _broken_json(place, error)
                return
            after_value = True
            row += 1
            yield place, value if isinstance(value, dict) else _no_object(value, place)


def csv_rows(path: Path) -> Rows:
    """The first line names the columns. Cells are strings, but for lists of messages and the like, written as JSON."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the module's own limit, 131,072 characters, is for the whole process
    with open_bytes(path) as file:
        # Bytes that are no UTF-8 become half characters, which are refused by line
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        row, line = 0, 1
        while True:
            place = Place(str(path), line, row)
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
                if twice := [name for number, name in enumerate(header) if name in header[:number]]:
                    fix = "rename or remove one of them: only one could be read"
                    got = f"two columns {twice[0]!r}"
                    yield place, Problem(str(place), got, "columns with different names", fix)
                    return
                continue
            row += 1
            if len(cells) != len(header):
                got, fix = f"{len(cells)} cells", "quote cells that hold commas or line ends"
                yield place, Problem(str(place), got, f"{len(header)} cells, as the first line names", fix)
                continue
            strange = next((byte for cell in cells if (byte := _HALF_BYTE.search(cell))), None)
            if strange is not None:
                yield place, _not_utf8(place, ord(strange[0]) - 0xDC00, strange.start())
                continue
            yield place, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True)}


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a file, None for one over MAX_LINE_BYTES."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(2**20)
        yield None


def _json_row(line: bytes, place: Place) -> dict[str, object] | Problem:
    """The line as a JSON object, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return _not_utf8(place, line[error.start], error.start, line)
    except (ValueError, RecursionError) as error:
        return _broken_json(place, error, one_a_line=True)
    return value if isinstance(value, dict) else _no_object(value, place, one_a_line=True)


def _cell(name: str, cell: str) -> object:
    """A cell as the formats need it: JSON lists of objects (messages, completions, tools) and numbers are read."""
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that is there twice: which of the two is meant, nobody knows."""
    read = dict(pairs)
    if len(read) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice!r} twice in one object")
    return read


def _end_of_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return position if match is None else match.end()


def _broken_json(place: Place, error: Exception | str, *, one_a_line: bool = False) -> Problem:
    said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    fix = "close what it opens, and remove comments and commas before brackets"
    if one_a_line:
        fix = "put the whole object on this line and close what it opens, or name the file .json if rows span lines"
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        fix = "mend or remove the row"  # a key that is there twice, a number of thousands of digits
    return Problem(str(place), f"broken JSON ({said})", "one JSON object a line" if one_a_line else "JSON", fix)


def _no_object(value: object, place: Place, *, one_a_line: bool = False) -> Problem:
    return Problem(
        where=str(place),
        value=f"a JSON {type_name(value)}",
        expected="one JSON object a line" if one_a_line else "a JSON object for each pair",
        fix="write each pair as an object, one a line (a file of one big list is named .json)"
        if one_a_line
        else "write each pair as an object",
    )


def _not_utf8(place: Place, byte: int, column: int, content: bytes = b"") -> Problem:
    """content: the file's, or its first lines, from its beginning where place is line 1."""
    fix = "write the file in UTF-8, for instance with iconv -f WINDOWS-1252 -t UTF-8, or what else it is written in"
    for mark, ending in _COMPRESSED.items():
        if content.startswith(mark):
            fix = f"the file is compressed: give its name the ending {ending}"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        fix = "write the file in UTF-8: iconv -f UTF-16 -t UTF-8"
    return Problem(where=str(place), value=f"the byte 0x{byte:02x} at column {column + 1}", expected="UTF-8", fix=fix)


def _too_long_a_line(place: Place) -> Problem:
    return Problem(
        where=str(place),
        value=f"a line of more than {MAX_LINE_BYTES // 2**20} MiB",
        expected="a pair a line, which no model reads at such a length",
        fix="put each pair on a line of its own, or remove this one",
    )
