"""Files that would never end, or fill the memory: pipes, devices, and small ones that stand for large ones."""

from __future__ import annotations

import csv
import gzip
import json
import os
import resource

import pytest
import zstandard

from megadpo.config.problems import DataError
from megadpo.data.formats.read_pairs import read_pairs
from megadpo.data.sources.rows import read_rows, source_digest

ROW = {"prompt": "a", "chosen": "b", "rejected": "c"}


def pack(name: str, content: bytes) -> bytes:
    return gzip.compress(content) if name.endswith(".gz") else zstandard.compress(content)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz", "p.csv.zst", "p.parquet", "p.arrow"])
def test_pipes_and_devices(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / f"zero-{name}").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / name, "a named pipe"), (tmp_path / f"zero-{name}", "a device")):
        for read in (lambda path=path: list(read_rows(path)), lambda path=path: source_digest(path)):
            with pytest.raises(DataError, match=f"{kind}, not a file"):
                read()
    for no_path in ("x" * 5000 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(DataError):
            list(read_rows(no_path))


def bombs() -> dict[str, tuple[bytes, int, bytes, str]]:
    """Name -> beginning, and so many times a piece of 1 MiB, and what is said."""
    x = b"x" * 2**20
    row = json.dumps(ROW).encode()
    return {
        "value.json.zst": (b"[" + row + b',{"prompt": "', 400, x, "p.json.zst:1: got 'a value of more than 8 MiB'"),
        "list.json.gz": (b"[" + row + b',{"prompt": [', 400, b"1," * 2**19, "got 'a value of more than 8 MiB'"),
        "cell.csv.zst": (b"prompt,chosen,rejected\na,b,", 400, x, "a row of more than 8 MiB"),
        "quoted.csv.zst": (
            b'prompt,chosen,rejected\na,b,"',
            400,
            b"xxx\n" * 2**18,
            "larger than field limit|of more than",
        ),
        "cells.csv.gz": (b"prompt,chosen,rejected\n", 400, b"a," * 2**19, "a row of more than 8 MiB"),
        "lines.csv.gz": (b"prompt,chosen,rejected\n", 400, b'"a\n",' * 2**18, "a row of more than 8 MiB"),
        "line.jsonl.zst": (b'{"prompt": "', 400, x, "a line of more than 8 MiB"),
    }


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(bombs()))
def test_small_files_that_stand_for_large_ones(tmp_path, name, monkeypatch):
    monkeypatch.setattr("megadpo.files.jsonl.MAX_LINE_BYTES", 2**23)
    limit = csv.field_size_limit()
    beginning, times, piece, words = bombs()[name]
    path = tmp_path / ("p." + name.partition(".")[2])
    path.write_bytes(pack(name, beginning + piece * times))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=words):
        list(read_pairs(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024, "of the 400 MiB that it stands for"
    csv.field_size_limit(limit)


def test_json_of_many_pieces(tmp_path, monkeypatch):
    """Every cut of the text between two pieces, characters of several bytes and numbers among what is cut."""
    rows = [{**ROW, "prompt": f'caf\u00e9 \U0001f600 {n} \\ "', "n": [n, -1.5e-3, True, None]} for n in range(12)]
    texts = [json.dumps(rows, ensure_ascii=False, indent=1), "\n ".join(json.dumps(row) for row in rows)]
    for number in (1, 2, 3, 5, 64):
        monkeypatch.setattr("megadpo.data.sources.json_objects._PIECE_BYTES", number)
        for text in texts:
            (tmp_path / "p.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
            read = list(read_rows(tmp_path / "p.json"))
            assert [row for _, row in read] == rows
            lines = [text[: text.index(f" {n} ")].rpartition("{")[0].count("\n") + 1 for n in range(12)]
            assert [place.line for place, _ in read] == lines
        bad = texts[0].encode().replace(b" 7 ", b" \xe9 ")
        (tmp_path / "p.json").write_bytes(bad)
        with pytest.raises(DataError, match="the byte 0xe9 at column") as caught:
            list(read_pairs(tmp_path / "p.json"))
        at = bad.index(b"\xe9 ")
        column = at - bad.rindex(b"\n", 0, at)
        assert f":{bad.count(chr(10).encode(), 0, at) + 1}: got 'the byte 0xe9 at column {column}'" in str(caught.value)
        (tmp_path / "p.json").write_text(texts[0].replace('"prompt"', "prompt", 5).replace("prompt:", '"prompt":', 4))
        with pytest.raises(DataError, match="broken JSON") as caught:
            list(read_pairs(tmp_path / "p.json"))
        line = texts[0][: texts[0].index(" 4 ")].count("\n") + 1
        assert f":{line}: " in str(caught.value)
