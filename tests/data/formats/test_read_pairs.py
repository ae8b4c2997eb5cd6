"""Reading JSONL: what is accepted, and that every refusal says file:line, value, expected and fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import DataError, Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, Row, RowFormat, find_format, formats_with
from megadpo.data.sources import MOST_PROBLEMS, Place
from tests.data.builders import read_all, row, write_rows

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def problems_of(path: Path, keys: dict[str, str] | None = None) -> list[Problem]:
    with pytest.raises(DataError) as refused:
        read_all(path, keys)
    for problem in refused.value.problems:
        assert problem.where.startswith(str(path)) and problem.expected and problem.fix
    return refused.value.problems


def only_problem(path: Path) -> str:
    (problem,) = problems_of(path)
    return str(problem)


def test_strings_and_messages_are_read_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [row(0), row(1, prompt=[USER], chosen=[ANSWER], rejected="no"), row(2, prompt="")]
    text = "\n\n".join(json.dumps(each, ensure_ascii=False) for each in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())  # byte order mark, no newline at the end
    pairs = read_all(path)
    assert [pair.prompt for pair in pairs] == [rows[0]["prompt"], (USER,), ""]
    assert pairs[1].chosen == (ANSWER,) and pairs[1].rejected == "no"
    assert [(pair.place.row, pair.place.line, str(pair.place)) for pair in pairs] == [
        (n, 2 * n + 1, f"{path}:{2 * n + 1}") for n in range(3)
    ]


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [{"question": "q", "good": "a", "bad": "b", "prompt": 7}])
    (pair,) = read_all(path, {"prompt_key": "question", "chosen_key": "good", "rejected_key": "bad"})
    assert (pair.prompt, pair.chosen, pair.rejected) == ("q", "a", "b")
    (problem,) = problems_of(path, {"prompt_key": "question", "chosen_key": "best", "rejected_key": "bad"})
    assert "no field 'best'" in str(problem) and "data.chosen_key" in problem.fix


def test_further_keys_of_messages_are_kept_for_the_template(tmp_path: Path) -> None:
    message = {**ANSWER, "reasoning_content": "hm"}
    (pair,) = read_all(write_rows(tmp_path / "p.jsonl", [row(prompt=[USER], chosen=[message])]))
    assert pair.chosen == (message,)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"chosen": ""}, "field 'chosen' empty"),
        ({"rejected": " \n"}, "field 'rejected' of white space only"),
        ({"chosen": "same", "rejected": "same"}, "'chosen' equal to 'rejected'"),
        ({"chosen": [ANSWER], "rejected": [dict(ANSWER)]}, "'chosen' equal to 'rejected'"),
        ({"prompt": 3}, "field 'prompt' of type int"),
        ({"prompt": None}, "field 'prompt' of type null"),
        ({"chosen": {"role": "assistant"}}, "field 'chosen' of type object"),
        ({"prompt": []}, "field 'prompt' without messages"),
        ({"prompt": ["hi"]}, "message 0 of field 'prompt' of type str"),
        ({"prompt": [USER, {"role": "user"}]}, "message 1 of field 'prompt' without content"),
        ({"prompt": [{"role": 1, "content": "x"}]}, "message 0 of field 'prompt' with role of type int"),
        ({"prompt": [{"role": "user", "content": None}]}, "with content of type null"),
        ({"prompt": [USER, ANSWER]}, "ends in an assistant message"),
        ({"chosen": []}, "field 'chosen' without messages"),
        ({"chosen": [USER, ANSWER]}, "with the roles ['user', 'assistant']"),
        (
            {"chosen": [{"role": "assistant", "content": " "}]},
            "content of message 0 of field 'chosen' of white space only",
        ),
        ({"prompt": "half \ud83d of it"}, "half a surrogate pair"),
    ],
)
def test_a_bad_field_is_refused_at_its_line(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), row(1, **changes), row(2)])
    said = only_problem(path)
    assert said.startswith(f"{path}:2: ") and expected in said.replace('"', "'").replace("\\'", "'")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "a", "chosen": ', "broken JSON"),
        (b'{"prompt": "caf\xe9"}', "the byte 0xe9 at column 16"),
        (b"[1, 2]", "a JSON list"),
        (b"[" * 100_000, "broken JSON (nested too deeply)"),
        (b'{"prompt": ' + b"9" * 10_000 + b"}", "broken JSON (Exceeds the limit"),
        (b"{}", "an empty object"),
        (b'{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}', "the key 'chosen' twice"),
        (b"null", "a JSON null"),
    ],
)
def test_a_broken_line_is_refused_at_its_number(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(json.dumps(row()).encode() + b"\n\n" + line + b"\n")
    problems = problems_of(path)
    assert all(problem.where == f"{path}:3" for problem in problems) and expected in str(problems[0])


def test_every_missing_field_of_a_row_is_named_at_once(tmp_path: Path) -> None:
    said = [str(problem) for problem in problems_of(write_rows(tmp_path / "p.jsonl", [{"prompt": "x", "answer": "y"}]))]
    assert (
        len(said) == 2
        and "no field 'chosen', only 'prompt', 'answer'" in said[0].replace('"', "")
        and "'rejected'" in said[1]
    )


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    assert "a file without rows" in only_problem(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in only_problem(tmp_path / "none.jsonl")
    assert "directory" in only_problem(tmp_path)


def test_all_problems_come_at_once_up_to_a_bound(tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [row(n, chosen="" if n % 2 else "yes") for n in range(10)])
    assert [problem.where for problem in problems_of(few)] == [f"{few}:{n}" for n in (2, 4, 6, 8, 10)]
    many = write_rows(tmp_path / "many.jsonl", [row(n, chosen="") for n in range(1000)])
    problems = problems_of(many)
    assert len(problems) == MOST_PROBLEMS + 1 and "not read" in problems[-1].fix


class Swapped(RowFormat):
    def fields(self) -> tuple[str, ...]:
        return ("q", "a")

    def read(self, row: Row, place: Place) -> PreferencePair:
        return PreferencePair(prompt=row["q"], chosen=row["a"][0], rejected=row["a"][1], place=place)


def test_a_further_format_joins_by_registering(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    FORMATS.add("Swapped")(Swapped)
    request.addfinalizer(lambda: FORMATS.remove("Swapped"))
    with pytest.raises(ValueError, match="already"):
        FORMATS.add("Swapped")(Swapped)
    assert find_format({"q": 1, "a": 2}, formats_with({})) == "Swapped"
    (pair,) = read_all(write_rows(tmp_path / "p.jsonl", [{"q": "?", "a": ["yes", "no"]}]))
    assert (pair.chosen, pair.rejected) == ("yes", "no")
    mixed = write_rows(tmp_path / "mixed.jsonl", [row(), {"q": "?", "a": ["yes", "no"]}])
    assert {problem.where for problem in problems_of(mixed)} == {f"{mixed}:2"}


def test_a_row_that_no_format_recognises_is_explained_by_the_usual_one(tmp_path: Path) -> None:
    assert find_format({"text": "x"}, formats_with({})) is None
    places = problems_of(write_rows(tmp_path / "p.jsonl", [{"text": "x"}]))
    assert ["'prompt', 'chosen' and 'rejected'" in problem.expected for problem in places] == [True] * 3
    assert str(Place("a/b.jsonl", 7, 3)) == "a/b.jsonl:7"
