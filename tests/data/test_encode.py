"""A file in chunks: nothing depends on how it was cut, or on the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import DataError
from megadpo.data.dataset import DataSettings, PairDataset
from megadpo.data.encode import MemorySink, encode_file
from tests.data.builders import row, write_rows
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def encode(path: Path, *, num_workers: int = 1, **settings: Any) -> tuple[Any, dict[str, list[int]]]:
    sink = MemorySink()
    limits: dict[str, Any] = {"max_total_sequence_length": 60, "on_too_long": "drop", **settings}
    summary = encode_file(path, tiny_tokenizer(), DataSettings(**limits), sink=sink, num_workers=num_workers)
    return summary, {name: sink.array(name).tolist() for name in ("tokens", "offsets", "rows", "lines")}


@pytest.mark.parametrize("chunk_pairs", [1, 3, 100])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_cutting_and_sharing_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_pairs: int, num_workers: int
) -> None:
    rows = [row(number, prompt="the " * (1 + 40 * (number % 3))) for number in range(17)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    whole = encode(path)
    monkeypatch.setattr("megadpo.data.encode.CHUNK_PAIRS", chunk_pairs)
    monkeypatch.setattr("megadpo.data.encode.ALONE_CHUNKS", 2)
    assert encode(path, num_workers=num_workers) == whole
    report = whole[0].report
    assert (report.rows, report.pairs, report.dropped_too_long) == (17, 12, 5)


def test_every_kind_of_problem_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.data.encode.CHUNK_PAIRS", 1)
    rows = [row(0, prompt="the " * 300), row(1), {"prompt": "x"}, row(2, prompt=""), row(3, prompt="the " * 500)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    monkeypatch.setattr("megadpo.data.encode.iterate_pairs", _good_rows_then_problems)
    with pytest.raises(DataError) as refused:
        encode(path, on_too_long="refuse", max_total_sequence_length=100)
    places = [problem.where.removeprefix(str(path)) for problem in refused.value.problems]
    assert places == [":3", ":3", ":4", ":1", ":5"], "two fields are missing at line 3"
    assert "of 2 such pairs" in refused.value.problems[-1].fix


def _good_rows_then_problems(path: Path, keys: Any) -> Any:
    """As a reader that streams: the good rows, and at the end what is wrong with the others."""
    from megadpo.data.reader import read_pairs

    lines = path.read_text().splitlines(keepends=True)
    problems = []
    for number, line in enumerate(lines):
        path.write_text("\n" * number + line)
        try:
            yield from read_pairs(path, keys)
        except DataError as error:
            problems += error.problems
    raise DataError(problems)


def test_a_large_file_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(number) for number in range(6)])
    monkeypatch.setattr("megadpo.data.encode.CHUNK_PAIRS", 2)
    monkeypatch.setattr("megadpo.data.encode._PROGRESS_S", 0.0)
    settings = DataSettings(max_total_sequence_length=100)
    encode_file(path, tiny_tokenizer(), settings, sink=MemorySink(), show_progress=True)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" rows")[0] for line in said] == [f"{path}: {count}" for count in (2, 4, 6)]


def test_without_a_cache_a_file_is_tokenised_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.data.encode.ALONE_CHUNKS", 0)
    monkeypatch.setattr("megadpo.data.workers._in_processes", lambda *_: pytest.fail("started a process"))
    path = write_rows(tmp_path / "p.jsonl", [row(0)])
    settings = DataSettings(max_total_sequence_length=100)
    assert len(PairDataset.with_settings(path, tiny_tokenizer(), settings, num_workers=4)) == 1
