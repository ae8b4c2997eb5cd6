"""Rows of .json files: a list of objects, or objects one after the other, each over as many lines as it likes.

A file is read a piece at a time, and a value of more than files.jsonl.MAX_LINE_BYTES is refused: a small compressed file
may hold one of terabytes.
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from megadpo.config.problems import Problem
from megadpo.data.sources import Place, Rows
from megadpo.data.sources.text import broken_json, not_an_object, not_utf8, unique_keys
from megadpo.files import jsonl

_SPACE = re.compile(r"[ \t\n\r]*")
_PIECE_BYTES = 2**18
_LONGEST_WORD = 12
"""Characters: what a value that is cut in a word, a number's exponent or a \\u escape may lack at its end."""


def json_rows(path: Path) -> Rows:
    """A row's line is that on which it begins. Nothing after broken JSON can be read. Raises UNREADABLE."""
    with jsonl.open_bytes(path) as file:
        text = _Text(file, str(path))
        row, in_list, after_value = 0, False, False
        while True:
            try:
                character = text.next_character()
                text.row = row
                if not character and not in_list:
                    return
                if not in_list and character == "[":
                    text.position, in_list, after_value = text.position + 1, True, False
                elif in_list and character == "]":
                    text.position, in_list = text.position + 1, False
                elif in_list and after_value and character == ",":
                    text.position, after_value = text.position + 1, False
                elif in_list and after_value:
                    yield text.place, broken_json(text.place, "',' or ']' is missing")
                    return
                else:
                    place = text.place
                    value = text.value()
                    after_value = True
                    row += 1
                    yield place, value if isinstance(value, dict) else not_an_object(value, place)
            except _NotReadable as error:
                yield error.place, error.problem
                return


class _NotReadable(Exception):
    def __init__(self, place: Place, problem: Problem) -> None:
        super().__init__(str(problem))
        self.place = place
        self.problem = problem


class _Text:
    """What has been read of a file and not been used."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.position = 0
        """Of the next character, in `_text`."""
        self.row = 0
        self._file = file
        self._path = path
        self._text = ""
        self._line = 1
        self._counted = 0  # characters of _text whose line ends are in _line
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(object_pairs_hook=unique_keys)
        self._lines_read, self._bytes_of_line = 1, 0
        self._is_beginning, self._is_at_end = True, False

    @property
    def place(self) -> Place:
        """Of the next character."""
        self._count_lines()
        return Place(self._path, self._line, self.row)

    def next_character(self) -> str:
        """That after white space; nothing at the end of the file. Raises _NotReadable and UNREADABLE."""
        while True:
            match = _SPACE.match(self._text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self._text):
                return self._text[self.position]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The value that begins here. Raises _NotReadable and UNREADABLE."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self.position)
                if end < len(self._text) or isinstance(value, (dict, list, str)) or not self._more():
                    self.position = end
                    return value
            except RecursionError as error:
                raise self._broken(self.place, error) from error
            except ValueError as error:
                if not self._may_be_cut(error) or not self._more():
                    here = self.place
                    ends = self._text.count("\n", self.position, error.pos) if _is_syntax(error) else 0
                    raise self._broken(Place(here.path, here.line + ends, here.row), error) from error
            if len(self._text) - self.position > jsonl.MAX_LINE_BYTES:
                got = f"a value of more than {jsonl.MAX_LINE_BYTES // 2**20} MiB"
                problem = Problem(str(self.place), got, "a pair, which no model reads at such a length", "remove it")
                raise _NotReadable(self.place, problem)

    def _may_be_cut(self, error: ValueError) -> bool:
        """Whether it may be for the end of what has been read."""
        if not _is_syntax(error):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_WORD

    def _broken(self, place: Place, error: Exception) -> _NotReadable:
        reason = f"{error.msg}: column {error.colno}" if _is_syntax(error) else error
        return _NotReadable(place, broken_json(place, reason))

    def _more(self) -> bool:
        """Reads on; False at the end of the file. As much again as there is, so that a long value is parsed few times."""
        if self._is_at_end:
            return False
        content = self._file.read(max(_PIECE_BYTES, len(self._text) - self.position))
        self._is_at_end = not content
        try:
            decoded = self._decoder.decode(content, final=self._is_at_end)
        except UnicodeDecodeError as error:
            raise self._not_utf8(error) from error
        self._count_bytes(content)
        self._count_lines()
        self._text, self.position, self._counted = self._text[self.position :] + decoded, 0, 0
        return bool(content) or bool(decoded)

    def _count_lines(self) -> None:
        self._line += self._text.count("\n", self._counted, self.position)
        self._counted = self.position

    def _count_bytes(self, content: bytes) -> None:
        self._is_beginning = self._is_beginning and not content
        self._lines_read += content.count(b"\n")
        last = content.rfind(b"\n")
        self._bytes_of_line = len(content) - last - 1 if last >= 0 else self._bytes_of_line + len(content)

    def _not_utf8(self, error: UnicodeDecodeError) -> _NotReadable:
        """error: of the bytes that were kept from the piece before, and of a new piece."""
        content = bytes(error.object)
        kept = len(self._decoder.getstate()[0]) if not self._is_beginning else 0
        ends = content.count(b"\n", 0, error.start)
        start = content.rfind(b"\n", 0, error.start) + 1
        column = error.start - start + (0 if ends else self._bytes_of_line - kept)
        place = Place(self._path, self._lines_read + ends, self.row)
        shown = content if self._is_beginning else b""
        return _NotReadable(place, not_utf8(place, content[error.start], column, shown))


def _is_syntax(error: Exception) -> TypeGuard[json.JSONDecodeError]:
    """Not of a key that is there twice, or a number of thousands of digits."""
    return isinstance(error, json.JSONDecodeError)
