"""Lines of JSON: bounded memory, compressed files, and what is said of a line that holds no object."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from megadpo.files import jsonl
from megadpo.files.jsonl import UNREADABLE, Line, LineError, read_lines, read_object, to_line


def test_blank_lines_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \r\n{"b": 2}')
    assert [(line.number, line.content) for line in read_lines(path)] == [(1, b'{"a": 1}'), (3, b'{"b": 2}')]


def test_a_line_is_never_held_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 5000 + b"\n" + b"y" * 999 + b"\n" + b"z" * 1000 + b"\n" + b"end")
    found = [(line.number, len(line.content), line.is_cut) for line in read_lines(path)]
    assert found == [(1, 1000, True), (2, 999, False), (3, 1000, True), (4, 3, False)]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_hold_the_same_lines(tmp_path: Path, ending: str) -> None:
    content = b"".join(to_line({"n": n}) for n in range(1000))
    compress = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(content[:700]) + compress(content[700:]))
    assert [read_object(line)["n"] for line in read_lines(path)] == list(range(1000))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_cut_or_damaged_file_is_unreadable(tmp_path: Path, ending: str) -> None:
    compress = gzip.compress if ending == ".gz" else zstandard.ZstdCompressor().compress
    path = tmp_path / f"a.jsonl{ending}"
    for content in (compress(b"{}\n" * 1000)[:-6], b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UNREADABLE):
            list(read_lines(path))
    with pytest.raises(UNREADABLE):
        list(read_lines(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("content", "reason", "found"),
    [
        (b"[1]", "not_an_object", "a JSON list"),
        (b"null", "not_an_object", "a JSON null"),
        (b'{"a": ', "broken_json", "broken JSON (Expecting value"),
        (b"[" * 100_000, "broken_json", "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "broken_json", "Exceeds the limit"),
        (b'{"a": "caf\xe9"}', "broken_utf8", "the byte 0xe9 at column 11"),
    ],
)
def test_a_line_without_an_object_says_what_it_holds(content: bytes, reason: str, found: str) -> None:
    with pytest.raises(LineError) as refused:
        read_object(Line(1, content))
    assert refused.value.reason == reason and found in str(refused.value)


def test_a_cut_line_is_not_parsed() -> None:
    with pytest.raises(LineError, match="more than 64 MiB"):
        read_object(Line(1, b"{}", is_cut=True))


@pytest.mark.parametrize("value", [{"a": "世界"}, {"a": "half \ud800"}, [1, None]])
def test_every_value_is_one_line(value: object) -> None:
    line = to_line(value)
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and json.loads(line) == value
    assert ("世界".encode() in line) == (value == {"a": "世界"})
