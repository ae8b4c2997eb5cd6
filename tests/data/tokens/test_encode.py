"""A file in chunks: nothing depends on how it was cut, or on the number of processes."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megadpo.config.problems import DataError
from megadpo.data.pairs import DataReport
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings, encode_source
from tests.data.builders import row, write_rows
from tests.helpers.tiny_tokenizer import tiny_tokenizer


def encode(path: Path, *, num_workers: int = 1, **settings: Any) -> tuple[DataReport, dict[str, list[int]]]:
    made: dict[str, list[int]] = defaultdict(list)
    limits: dict[str, Any] = {"max_total_sequence_length": 60, "on_too_long": "drop", **settings}

    def sink(name: str, values: Any) -> None:
        made[name] += [None if value != value else value for value in values.tolist()]  # NaN is not equal to itself

    report = encode_source(path, tiny_tokenizer(), DataSettings(**limits), sink=sink, num_workers=num_workers)
    assert set(made) == {"tokens", "offsets", "rows", "identities", "values", "lines"}
    return report, made


@pytest.mark.parametrize("chunk_pairs", [1, 3, 100])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_cutting_and_sharing_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_pairs: int, num_workers: int
) -> None:
    rows = [row(number, prompt="the " * (1 + 40 * (number % 3))) for number in range(17)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    whole = encode(path)
    monkeypatch.setattr("megadpo.data.tokens.encode.CHUNK_PAIRS", chunk_pairs)
    monkeypatch.setattr("megadpo.data.tokens.encode.ALONE_CHUNKS", 2)
    assert encode(path, num_workers=num_workers) == whole
    report = whole[0]
    assert (report.rows, report.pairs, report.dropped_too_long) == (17, 12, 5)


@pytest.mark.parametrize("chunk_pairs", [1, 2, 100])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_rows_of_several_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_pairs: int, num_workers: int
) -> None:
    """A row's pairs keep its line, wherever chunks end, and are the pairs that rows of two answers each would make."""
    monkeypatch.setattr("megadpo.data.tokens.encode.CHUNK_PAIRS", chunk_pairs)
    monkeypatch.setattr("megadpo.data.tokens.encode.ALONE_CHUNKS", 1)
    answers = [{"text": f"the answer {n} " * (1 + n), "score": -n} for n in range(4)]
    groups = [{"prompt": f"question {n}", "answers": answers[: 2 + n % 3]} for n in range(5)]
    path = write_rows(tmp_path / "groups.jsonl", groups)
    settings = DataSettings(max_total_sequence_length=256)
    pairs = open_dataset(path, tiny_tokenizer(), settings, num_workers=num_workers)
    indices = [pair.index for pair in pairs]
    assert indices == [0] + [1] * 3 + [2] * 6 + [3] + [4] * 3 and (pairs.report.rows, pairs.report.pairs) == (5, 14)
    assert pairs.source_of(2) == f"{path}:3"
    alone = [
        {"prompt": group["prompt"], "chosen": better["text"], "rejected": worse["text"]}
        for group in groups
        for better, worse in combinations(group["answers"], 2)
    ]
    other = open_dataset(write_rows(tmp_path / "alone.jsonl", alone), tiny_tokenizer(), settings)
    for pair, same in zip(pairs, other, strict=True):
        for ids in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert np.array_equal(getattr(pair, ids), getattr(same, ids))


def test_every_kind_of_problem_is_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.data.tokens.encode.CHUNK_PAIRS", 1)
    rows = [row(0, prompt="the " * 300), row(1), {"prompt": "x"}, row(2, prompt=""), row(3, prompt="the " * 500)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError) as refused:
        encode(path, on_too_long="refuse", max_total_sequence_length=100)
    places = [problem.where.removeprefix(str(path)) for problem in refused.value.problems]
    assert places == [":3", ":3", ":4", ":1", ":5"], "two fields are missing at line 3"
    assert "of 2 such pairs" in refused.value.problems[-1].fix


def test_a_large_file_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(number) for number in range(6)])
    monkeypatch.setattr("megadpo.data.tokens.encode.CHUNK_PAIRS", 2)
    monkeypatch.setattr("megadpo.data.tokens.encode._PROGRESS_S", 0.0)
    settings = DataSettings(max_total_sequence_length=100)
    encode_source(path, tiny_tokenizer(), settings, sink=lambda name, values: None, show_progress=True)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" rows")[0] for line in said] == [f"{path}: {count}" for count in (2, 4, 6)]


def test_without_a_cache_a_file_is_tokenised_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.data.tokens.encode.ALONE_CHUNKS", 0)
    monkeypatch.setattr("megadpo.data.tokens.workers._in_processes", lambda *_: pytest.fail("started a process"))
    path = write_rows(tmp_path / "p.jsonl", [row(0)])
    settings = DataSettings(max_total_sequence_length=100)
    assert len(open_dataset(path, tiny_tokenizer(), settings, num_workers=4)) == 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_rows_left_out_leave_lines_and_counts_right(
    tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that can't be read and pairs that can't be tokenised, at both ends of the file and of its chunks."""
    monkeypatch.setattr("megadpo.data.tokens.encode.CHUNK_PAIRS", 4)
    monkeypatch.setattr("megadpo.data.tokens.encode.ALONE_CHUNKS", 1)
    bad = {0, 1, 5, 9, 10, 19}
    special = {4, 12}
    rows = [{"x": n} if n in bad else row(n, chosen="</s>") if n in special else row(n) for n in range(20)]
    path = write_rows(tmp_path / "p.jsonl", rows)
    settings = DataSettings(max_total_sequence_length=256, on_bad_row="drop")
    pairs = open_dataset(path, tiny_tokenizer(), settings, num_workers=num_workers)
    assert [pair.index for pair in pairs] == [n for n in range(20) if n not in bad | special]
    assert [pairs.source_of(pair.index) for pair in pairs] == [f"{path}:{pair.index + 1}" for pair in pairs]
    assert (pairs.report.rows, pairs.report.dropped_bad_rows, pairs.report.pairs) == (20, 8, 12)
    assert f"{path}:1: " in pairs.report.first_bad_row
