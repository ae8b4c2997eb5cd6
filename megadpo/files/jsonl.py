"""JSON Lines: files with one JSON object on each line, plain or compressed with gzip or Zstandard.

MAX_LINE_BYTES limits the memory for a file of any size and content.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

from megadpo.files.regular import require_regular

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is cut: its file has no line ends, or no model could train on this row."""

UNREADABLE = (OSError, EOFError, zlib.error)
"""What opening or reading a missing, truncated or damaged file raises."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ZSTD_PIECE_BYTES = 2**11
"""Compressed bytes that are read at a time. Four bytes may expand to 128 KiB, so a piece to 64 MiB."""

LineReason: TypeAlias = Literal["line_too_long", "broken_utf8", "broken_json", "not_an_object"]


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    """From 1; blank lines count."""
    content: bytes
    """Without its line end; the first MAX_LINE_BYTES of a longer line."""
    is_cut: bool = False
    """Whether the line was longer."""


class LineError(ValueError):
    """A line is no JSON object. The text says what it is; the cause is the decoder's error, if there was one."""

    def __init__(self, reason: LineReason, found: str) -> None:
        super().__init__(found)
        self.reason = reason


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, uncompressed if its name ends in .gz or .zst. Opening and reading raise UNREADABLE, also for pipes
    and devices."""
    require_regular(path)
    name = path.name.lower()
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if name.endswith(".zst"):
        return cast(BinaryIO, io.BufferedReader(_ZstdFile(path)))
    return path.open("rb")


def read_lines(path: Path) -> Iterator[Line]:
    """Every line that is not blank. Raises UNREADABLE."""
    most = MAX_LINE_BYTES
    with open_bytes(path) as file:
        number = 0
        while content := file.readline(most + 1):
            number += 1
            is_cut, rest = len(content) > most, content
            while is_cut and rest and not rest.endswith(b"\n"):
                rest = file.readline(2**20)
            content = content.removeprefix(BYTE_ORDER_MARK) if number == 1 else content
            if content.strip():
                yield Line(number, content[:most].rstrip(b"\r\n"), is_cut)


def read_object(line: Line, **options: Any) -> dict[str, Any]:
    """The JSON object of a line. options: for json.loads; its hooks may raise ValueError. Raises LineError."""
    if line.is_cut:
        raise LineError("line_too_long", f"a line of more than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        value = json.loads(line.content.decode("utf-8"), **options)
    except UnicodeDecodeError as error:
        byte = line.content[error.start]
        raise LineError("broken_utf8", f"the byte 0x{byte:02x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise LineError("broken_json", f"broken JSON ({reason})") from error
    if not isinstance(value, dict):
        raise LineError("not_an_object", f"a JSON {type_name(value)}")
    return value


def to_line(value: object) -> bytes:
    """A value as one line of JSON with its line end: in UTF-8, or in ASCII with \\u escapes if UTF-8 can't encode it (half of
    a surrogate pair). Raises TypeError and ValueError for values that JSON doesn't have."""
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode("ascii") + b"\n"


def type_name(value: object) -> str:
    """JSON's name for the type of a value."""
    return {type(None): "null", dict: "object", list: "list", bool: "boolean"}.get(type(value), type(value).__name__)


class _ZstdFile(io.RawIOBase):
    """The content of all Zstandard frames of a file. (zstandard's own reader doesn't notice a truncated frame.)"""

    def __init__(self, path: Path) -> None:
        import zstandard  # here, because it takes a tenth of a second

        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._damage = zstandard.ZstdError
        self._frame = self._new_frame()
        self._is_inside = False
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises EOFError for a frame without its end, OSError for a damaged one."""
        while not self._content:
            piece = self._frame.unused_data if self._frame.eof else b""
            piece = piece or self._file.read(_ZSTD_PIECE_BYTES)
            if self._frame.eof:
                self._frame, self._is_inside = self._new_frame(), False
            if not piece:
                if self._is_inside:
                    raise EOFError("a Zstandard frame without its end")
                return 0
            try:
                self._content, self._is_inside = memoryview(self._frame.decompress(piece)), True
            except self._damage as error:
                raise OSError(f"damaged Zstandard data: {error}") from error
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
