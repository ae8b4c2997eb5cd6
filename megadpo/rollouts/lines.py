"""Lines of a JSONL file, plain, .gz or .zst, none of them ever larger in memory than MAX_LINE_BYTES."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from megadpo.config.problems import DataError, Problem
from megadpo.data.sources.text import open_bytes

MAX_LINE_BYTES = 64 * 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BROKEN_ARCHIVE = (OSError, EOFError, zlib.error, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class Line:
    number: int
    """From 1."""
    content: bytes
    """Without its end; the first MAX_LINE_BYTES of a longer one."""
    cut: bool
    """Whether it was longer."""


def read_lines(path: Path, max_bytes: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """Every line that is not blank. Raises DataError for a file that can't be opened or unpacked to its end."""
    number = 0
    try:
        with open_bytes(path) as file:
            while chunk := file.readline(max_bytes + 1):
                number += 1
                cut = len(chunk) > max_bytes and not chunk.endswith(b"\n")
                while cut and (rest := file.readline(max_bytes)) and not rest.endswith(b"\n"):
                    pass
                content = chunk.removeprefix(_BYTE_ORDER_MARK) if number == 1 else chunk
                if content.strip():
                    yield Line(number, content[:max_bytes].rstrip(b"\r\n"), cut)
    except _BROKEN_ARCHIVE as error:
        raise DataError(unreadable(path, number, error)) from error


def unreadable(path: Path, line: int, error: Exception) -> Problem:
    said = error.strerror if isinstance(error, OSError) else None
    return Problem(
        where=f"{path}:{line}" if line else str(path),
        value=said or f"{type(error).__name__}: {error}",
        expected="a rollouts file that can be read to its end (.jsonl, .jsonl.gz or .jsonl.zst)",
        fix="check the path, or copy the file again",
    )
