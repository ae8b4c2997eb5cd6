"""Files of rollouts: what is read, and what is left out with its file:line."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pytest
import zstandard

from megadpo.config.problems import DataError
from megadpo.rollouts.left_out import LeftOut
from megadpo.rollouts.read import ReadRollouts, read_rollouts
from megadpo.rollouts.row import RowOptions
from megadpo.rollouts.store import TextStore
from tests.rollouts.builders import call, call_output, current, message, older, write


def read(*paths: Path, options: RowOptions | None = None) -> tuple[ReadRollouts, list[dict]]:
    """The rollouts, and the records of what was left out."""
    file = io.BytesIO()
    with TextStore(paths[0].parent) as store:
        done = read_rollouts(paths, store, LeftOut(file), options or RowOptions())
    return done, [json.loads(line) for line in file.getvalue().splitlines()]


def test_good_rows_are_read_and_bad_ones_go_aside_by_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl",
        [
            current("q", "good", 1),
            b"",
            b'{"reward": 1, "responses_create_params": {"input"',
            b'{"reward": "\xff"}',
            [1, 2],
            current("q", "nan", float("nan")),
            {"input": "q", "response": {"output": "no reward"}},
            older("q", "of another generation", 1),
            b"5" * 5000,
            b"[" * 100_000,
            current("q", "half \ud800", 1),
            current("half \ud800", "x", 1),
            current("q", "also good", 0),
        ],
    )
    done, aside = read(path)
    assert [(one.line, one.position, one.reward) for one in done.rollouts] == [(1, 0, 1.0), (13, 11, 0.0)]
    assert done.rows == {str(path): 12}
    assert [(record["where"].removeprefix(f"{tmp_path}/"), record["reason"]) for record in aside] == [
        ("r.jsonl:3", "broken_json"),
        ("r.jsonl:4", "broken_utf8"),
        ("r.jsonl:5", "not_an_object"),
        ("r.jsonl:6", "reward_not_finite"),
        ("r.jsonl:7", "no_reward"),
        ("r.jsonl:8", "mixed_generations"),
        ("r.jsonl:9", "broken_json"),
        ("r.jsonl:10", "broken_json"),
        ("r.jsonl:11", "half_character"),
        ("r.jsonl:12", "half_character"),
    ]
    assert aside[1]["line"] == '{"reward": "\\xff"}' and aside[1]["value"] == "the byte 0xff at column 13"
    assert all(record["fix"] and record["expected"] and record["value"] and record["line"] for record in aside)
    assert json.loads(aside[8]["line"]) == current("q", "half \ud800", 1)


def test_both_generations_are_read_from_a_file_each(tmp_path: Path) -> None:
    paths = write(tmp_path / "new.jsonl", [current("q", "a", 1)]), write(tmp_path / "old.jsonl", [older("q", "b", 0)])
    done, aside = read(*paths)
    assert len(done.rollouts) == 2 and not aside
    assert done.rollouts[0].prompt == done.rollouts[1].prompt != done.rollouts[0].answer


def test_a_line_over_the_limit_goes_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megadpo.files.jsonl.MAX_LINE_BYTES", 1000)
    done, aside = read(write(tmp_path / "r.jsonl", [current("q", "x" * 5000, 1), current("q", "fits", 1)]))
    assert [one.line for one in done.rollouts] == [2] and aside[0]["reason"] == "line_too_long"


def test_the_first_mebibyte_of_a_refused_line_is_kept(tmp_path: Path) -> None:
    _, aside = read(write(tmp_path / "r.jsonl", [b"5" * 2**20 + b"6", current("q", "a", 1)]))
    assert aside[0]["line"] == "5" * 2**20


def test_compressed_files_say_the_same(tmp_path: Path) -> None:
    plain = write(tmp_path / "r.jsonl", [current("q", f"answer {n}", n) for n in range(50)])
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    halves = plain.read_bytes()[:700], plain.read_bytes()[700:]
    (tmp_path / "r.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(half) for half in halves))
    want = [(one.line, one.reward, one.answer_chars) for one in read(plain)[0].rollouts]
    assert len(want) == 50
    for suffix in ("gz", "zst"):
        done, aside = read(tmp_path / f"r.jsonl.{suffix}")
        assert [(one.line, one.reward, one.answer_chars) for one in done.rollouts] == want and not aside


def test_every_file_that_cannot_be_read_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"reward": 1}\n' * 1000)[:-20])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"reward": 1}\n' * 1000)[:-5])
    (tmp_path / "no.jsonl.zst").write_bytes(b"no archive")
    names = ["empty.jsonl", "absent.jsonl", "cut.jsonl.gz", "cut.jsonl.zst", "no.jsonl.zst"]
    with pytest.raises(DataError) as refused:
        read(*(tmp_path / name for name in names))
    said = [problem.where.removeprefix(f"{tmp_path}/").split(":")[0] for problem in refused.value.problems]
    assert said == names
    assert "No such file" in str(refused.value) and "without rows" in str(refused.value)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(current("q", "a", 1)).encode() + b"\r\n\r\n")
    assert [one.line for one in read(path)[0].rollouts] == [1]


def test_equal_prompts_and_answers_get_equal_numbers(tmp_path: Path) -> None:
    """Ids of tool calls are random: answers that differ in nothing else are the same answer."""
    answers = [[call("f", "{}", name), call_output("1", name), message("one")] for name in ("call_a", "call_b")]
    tool = {"tools": [{"type": "function", "name": "f"}]}
    rows = [
        current("q", answers[0], 1),
        current("q", answers[1], 0),
        current("q", "one", 0),
        current("q", "one", 0, params=tool),
    ]
    one, two, three, four = read(write(tmp_path / "r.jsonl", rows))[0].rollouts
    assert one.prompt == two.prompt == three.prompt != four.prompt
    assert one.answer == two.answer != three.answer == four.answer


def test_the_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    with TextStore(tmp_path) as store:
        messages = [{"role": "user", "content": "Ünïcode 世界"}]
        prompt, answer = store.add_prompt(messages, [{"type": "function"}]), store.add_answer(messages)
        assert store.get(answer) == messages
        assert store.get(prompt) == {"prompt": messages, "tools": [{"type": "function"}]}
        assert store.add_answer([{"role": "user", "content": "Ünïcode 世界"}]) == answer != prompt
    assert list(tmp_path.iterdir()) == []


def test_notes_count_rollouts(tmp_path: Path) -> None:
    cut = [message("a"), message("b", "user"), message("c", "user")]
    done, _ = read(write(tmp_path / "r.jsonl", [current("q", cut, 1), current("q", cut, 0)]))
    assert list(done.notes.values()) == [2]
