"""Every format of rows: what pair it means, what is refused, and that it is recognised by its fields."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megadpo.config.problems import DataError
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, find_format, formats_with
from megadpo.data.formats.read_pairs import ReadCounts
from tests.data.builders import read_all, write_rows


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SYSTEM, ASK = {"role": "system", "content": "be brief"}, user("ask")
GOOD, BAD = bot("good"), bot("bad")


def ranked(first: int, second: int, *more: int) -> dict[str, Any]:
    completions = [
        {"rank": rank, "completion": [bot(f"rank {rank}, {n}")]} for n, rank in enumerate((first, second, *more))
    ]
    return {"context": [ASK], "completions": completions}


def scored(*scores: float | None, **more: Any) -> dict[str, Any]:
    return {"prompt": "q", "answers": [{"text": f"a{n}", "score": score} for n, score in enumerate(scores)], **more}


def read(folder: Path, *rows: object, **options: Any) -> list[PreferencePair]:
    return read_all(write_rows(folder / "rows.jsonl", rows), **options)


def refusals(folder: Path, *rows: object, **options: Any) -> list[str]:
    with pytest.raises(DataError) as refused:
        read(folder, *rows, **options)
    assert all(problem.fix and problem.expected for problem in refused.value.problems)
    return [str(problem).replace(str(folder) + "/", "") for problem in refused.value.problems]


def test_every_file_of_a_format_is_found_without_numpy() -> None:
    code = (
        "import sys; from megadpo.config.variants import FORMATS; "
        "print(*FORMATS.names(), *sorted({'numpy', 'torch', 'pyarrow', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {case[1] for case in ROWS.values()} | {"Tulu3Preference"}


ROWS = {
    # row: format, prompt, chosen, rejected
    "strings": (
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "BinaryPreferenceDataset",
        ("q", "good", "bad"),
    ),
    "messages": (
        {"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]},
        "BinaryPreferenceDataset",
        ((SYSTEM, ASK), (GOOD,), (BAD,)),
    ),
    "messages and plain answers": (
        {"prompt": [ASK], "chosen": "good", "rejected": "bad"},
        "BinaryPreferenceDataset",
        ((ASK,), "good", "bad"),
    ),
    "a prompt and full conversations": (
        {"prompt": "ask", "chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        "BinaryPreferenceDataset",
        ((SYSTEM, ASK), (GOOD,), (BAD,)),
    ),
    "prompt messages and full conversations": (
        {"prompt": [ASK], "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "BinaryPreferenceDataset",
        ((ASK,), (GOOD,), (BAD,)),
    ),
    "answers that share their first turns": (
        {"prompt": [ASK], "chosen": [GOOD, user("more"), bot("a")], "rejected": [GOOD, user("more"), bot("b")]},
        "BinaryPreferenceDataset",
        ((ASK, GOOD, user("more")), (bot("a"),), (bot("b"),)),
    ),
    "DPODataset": (
        {"prompt": "q", "chosen_response": "good", "rejected_response": "bad"},
        "DPODataset",
        ("q", "good", "bad"),
    ),
    "ranks": (ranked(0, 1), "PreferenceDataset", ((ASK,), (bot("rank 0, 0"),), (bot("rank 1, 1"),))),
    "ranks, the better one last": (
        ranked(7, -2),
        "PreferenceDataset",
        ((ASK,), (bot("rank -2, 1"),), (bot("rank 7, 0"),)),
    ),
    "scored answers": (
        {"prompt": "q", "answers": [{"text": "bad", "score": -1}, {"text": "good", "score": 0.5}]},
        "ScoredAnswers",
        ("q", "good", "bad"),
    ),
    "scored answers of messages": (
        {"prompt": [ASK], "answers": [{"messages": [GOOD], "score": 1}, {"messages": [BAD], "score": 0, "text": None}]},
        "ScoredAnswers",
        ((ASK,), (GOOD,), (BAD,)),
    ),
    "HelpSteer3, the first one better": (
        {"context": [ASK], "response1": "good", "response2": "bad", "overall_preference": -2},
        "HelpSteer3",
        ((ASK,), "good", "bad"),
    ),
    "HelpSteer3, the second one better": (
        {"domain": "code", "context": "ask", "response1": "bad", "response2": "good", "overall_preference": 3},
        "HelpSteer3",
        ("ask", "good", "bad"),
    ),
    "implicit prompt": (
        {"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, ASK, BAD]},
        "ImplicitPrompt",
        ((SYSTEM, ASK), (GOOD,), (BAD,)),
    ),
    "implicit prompt, parting at the user's turn": (
        {"chosen": [ASK, GOOD, user("a"), bot("1")], "rejected": [ASK, GOOD, user("b"), bot("2")]},
        "ImplicitPrompt",
        ((ASK, GOOD), (user("a"), bot("1")), (user("b"), bot("2"))),
    ),
    "one conversation goes on where the other ends": (
        {"chosen": [ASK, GOOD], "rejected": [ASK, GOOD, user("a"), bot("1")]},
        "ImplicitPrompt",
        ((ASK,), (GOOD,), (GOOD, user("a"), bot("1"))),
    ),
    "transcripts": (
        {"chosen": "\n\nHuman: ask\n\nAssistant: good", "rejected": "\n\nHuman: ask\n\nAssistant: bad"},
        "ImplicitPrompt",
        ("\n\nHuman: ask\n\nAssistant:", " good", " bad"),
    ),
    "longer transcripts": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e\n\nHuman: f\n\nAssistant: g",
        },
        "ImplicitPrompt",
        (
            "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
            " d",
            " e\n\nHuman: f\n\nAssistant: g",
        ),
    ),
    "transcripts that part at the human's turn": (
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f",
        },
        "ImplicitPrompt",
        (
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman: c\n\nAssistant: d",
            "\n\nHuman: e\n\nAssistant: f",
        ),
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_recognised_and_read(case: str, tmp_path: Path) -> None:
    row, name, texts = ROWS[case]
    found = find_format(row, formats_with({}))
    assert found == name
    for options in ({}, {"dataset_name": name}):
        (pair,) = read(tmp_path, row, **options)
        assert (pair.prompt, pair.chosen, pair.rejected) == texts
        assert pair.is_transcript == (isinstance(pair.prompt, str) and name == "ImplicitPrompt")


def test_the_rows_that_the_page_shows_are_what_it_says() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| (\w+) \| `(.*?)`", page, flags=re.MULTILINE))
    assert set(shown) == set(FORMATS.names())
    for name, text in shown.items():
        fields = dict.fromkeys(re.findall(r'[{ ]"(\w+)":', text))
        found = find_format(fields, formats_with({}))
        assert found == name or {found, name} == {"ImplicitPrompt", "Tulu3Preference"}


SCORED = [
    # scores, pairs of the row, pairs of the config, what they make
    ((1, 3, 2), None, None, [(1, 2), (1, 0), (2, 0)]),
    ((1, 3, 2), None, "best_worst", [(1, 0)]),
    ((1, 3, 2), None, "adjacent", [(1, 2), (2, 0)]),
    ((1, 3, 2), "adjacent", "best_worst", [(1, 2), (2, 0)]),
    ((1, 0, 1, 0), None, "all", [(0, 1), (0, 3), (2, 1), (2, 3)]),
    ((1, 0, 1, 0), None, "best_worst", [(0, 3)]),
    ((1, 0, 1, 0), None, "adjacent", [(2, 1)]),
    ((None, None, None), [[2, 0], [0, 1]], None, [(2, 0), (0, 1)]),
    ((1, 0, None), [[2, 0], [0, 1]], "best_worst", [(2, 0), (0, 1)]),
]


@pytest.mark.parametrize(("scores", "of_row", "of_config", "made"), SCORED)
def test_which_pairs_scored_answers_make(scores, of_row, of_config, made, tmp_path: Path) -> None:
    row = scored(*scores, **({} if of_row is None else {"pairs": of_row}))
    options = {} if of_config is None else {"answer_pairs": of_config}
    pairs = read(tmp_path, row, scored(1, 0), keys=options)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(f"a{i}", f"a{j}") for i, j in [*made, (0, 1)]]
    assert [pair.place.row for pair in pairs] == [0] * len(made) + [1]


def test_tulu_takes_the_prompt_from_the_answers_whatever_its_field_says(tmp_path: Path) -> None:
    row = {"id": "x", "source": "y", "prompt": "something else", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}
    (pair,) = read(tmp_path, row, dataset_name="Tulu3Preference")
    assert (pair.prompt, pair.chosen, pair.rejected) == ((ASK,), (GOOD,), (BAD,))
    (said,) = refusals(tmp_path, row)
    assert "rows.jsonl:1" in said and "Tulu3Preference" in said


BAD_ROWS = [
    (ranked(0, 1, 2), "3 completions"),
    ({"context": [ASK], "completions": [{"rank": 0, "completion": [GOOD]}]}, "1 completions"),
    (ranked(1, 1), "two completions of rank 1"),
    ({**ranked(0, 1), "completions": "none"}, "completions: str"),
    ({**ranked(0, 1), "completions": [{"rank": "0", "completion": [GOOD]}, 7]}, "rank '0'"),
    ({**ranked(0, 1), "completions": [{"rank": True, "completion": [GOOD]}, {"rank": 1}]}, "rank True"),
    ({**ranked(0, 1), "context": [ASK, GOOD]}, "ends in an assistant message"),
    ({"prompt": "q", "answers": [{"text": "a", "score": 1}]}, "1 answer"),
    ({"prompt": "q", "answers": {"text": "a"}}, "answers: object"),
    (scored(1, 1, 1), "3 answers of score 1"),
    (scored(1, None, 0), "answers[1] without a score"),
    (scored(1, True, 0), "answers[1] with the score True"),
    (scored(1, float("inf")), "answers[1] with the score inf"),
    (scored(1, 10**400), "answers[1] with the score 1000"),
    ({"prompt": "q", "answers": [{"text": "a", "score": 1}, {"answer": "b"}]}, "answers[1] with the fields 'answer'"),
    (
        {"prompt": "q", "answers": [{"text": "a", "score": 1}, {"text": "a", "score": 0}]},
        "answers[0] and answers[1] equal",
    ),
    (scored(1, 0, pairs=[[0, 2]]), "pairs[0]: [0, 2]"),
    (scored(1, 0, pairs=[[0, -1]]), "pairs[0]: [0, -1]"),
    (scored(1, 0, pairs=[[0, 1], [1, 0]]), "pairs[1]: [1, 0], with the scores 0 and 1"),
    (scored(1, 1, pairs=[[0, 1]]), "pairs[0]: [0, 1], with the scores 1 and 1"),
    (scored(None, None, pairs=[[0, 0]]), "two equal answers"),
    (scored(1, 0, pairs=[0, 1]), "pairs[0]: 0"),
    (scored(1, 0, pairs=[]), "no pairs"),
    (scored(1, 0, pairs="some"), "pairs: 'some'"),
    (scored(1, 0, pairs=3), "pairs: int"),
    ({"context": "c", "response1": "a", "response2": "b", "overall_preference": 0}, "overall_preference 0"),
    ({"context": "c", "response1": "a", "response2": "b", "overall_preference": None}, "overall_preference"),
    ({"context": "c", "response1": "a", "response2": "b", "overall_preference": float("nan")}, "nan"),
    ({"prompt": "q", "chosen_response": "good", "rejected_response": ""}, "'rejected_response' empty"),
    ({"chosen": [ASK, GOOD], "rejected": [user("other"), BAD]}, "begin differently"),
    ({"chosen": [SYSTEM, ASK, GOOD], "rejected": [SYSTEM, user("other"), BAD]}, "begin differently"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK, GOOD]}, "two equal answers"),
    ({"prompt": [{"role": "", "content": "q"}], "chosen": "a", "rejected": "b"}, "with an empty role"),
    ({"chosen": [ASK, GOOD], "rejected": [ASK]}, "roles ['user']"),
    ({"chosen": [ASK, GOOD], "rejected": "\n\nHuman: ask\n\nAssistant: bad"}, "one answer as a string"),
    ({"chosen": "good", "rejected": "bad"}, "no field 'prompt'"),
    ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "empty at its end"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a"}, "without an answer at its end"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "begin differently"),
    ({"prompt": "q", "chosen": [bot("a"), ASK], "rejected": "b"}, "roles ['assistant', 'user']"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "field 'images'"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": "curl"}, "field 'tools'"),
    ({"text": "x"}, "no field 'prompt'"),
    ({"prompt": json.dumps([ASK]), "chosen": "a", "rejected": "b"}, "'prompt': messages as JSON text"),
    ({"prompt": "q", "chosen": "\n " + json.dumps([GOOD]), "rejected": "b"}, "'chosen': messages as JSON text"),
    (
        {"prompt": [user("a"), {"role": "user", "content": [{"type": "image", "image": "x"}]}], "chosen": "a"},
        "parts other than text",
    ),
    ({"prompt": "q", "chosen": [bot("", tool_calls=[{"function": {"name": 3}}])], "rejected": "b"}, "tool_calls"),
    ({"prompt": "q", "chosen": [bot("", tool_calls="f()")], "rejected": "b"}, "tool_calls"),
    ({"prompt": "q", "chosen": [bot("", reasoning_content=["hm"])], "rejected": "b"}, "reasoning_content"),
]


@pytest.mark.parametrize(("row", "words"), BAD_ROWS)
def test_a_bad_row_is_refused_by_its_line(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    found = find_format(row, formats_with({}))
    good = next((case[0] for case in ROWS.values() if case[1] == found), ROWS["strings"][0])
    said = refusals(tmp_path, good, row)
    assert all(one.startswith("rows.jsonl:2: ") for one in said)
    assert any(words in one.replace('"', "'").replace("\\'", "'") for one in said), said


def test_arguments_of_tool_calls_are_objects_for_the_template(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, null]}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": "3"}
    row = {
        "prompt": [ASK],
        "chosen": [bot(None, tool_calls=[call], reasoning_content="hm"), result, GOOD],
        "rejected": [bot("", tool_calls=[{"name": "add", "arguments": ""}])],
        "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
    }
    (pair,) = read(tmp_path, row)
    (first, tool, last), (rejected,) = pair.chosen, pair.rejected
    assert first["tool_calls"] == [{**call, "function": {"name": "add", "arguments": {"a": [1, None]}}}]
    assert first["content"] == "" and first["reasoning_content"] == "hm" and (tool, last) == (result, GOOD)
    assert rejected["tool_calls"] == [{"name": "add", "arguments": {}}]
    assert pair.tools == ({"type": "function", "function": {"name": "add"}},)


def test_null_keys_of_a_message_and_parts_of_text_are_made_plain(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "as"}, {"type": "input_text", "text": "k"}]
    row = {
        "prompt": [{"role": "user", "content": parts, "name": None}],
        "chosen": [bot("good", tool_calls=None)],
        "rejected": [bot("bad", tool_calls=[])],
        "tools": None,
        "images": [],
    }
    (pair,) = read(tmp_path, row)
    assert (pair.prompt, pair.chosen, pair.rejected, pair.tools) == ((ASK,), (GOOD,), (BAD,), None)


def test_answers_as_the_sampling_guides_script_writes_them(tmp_path: Path) -> None:
    """`'chosen': sorted_group[0]['output']`: items of the Responses API. Messages are read as they are, others are not
    guessed at."""
    item = {"id": "m", "type": "message", "role": "assistant", "status": "completed"}
    part = {"type": "output_text", "text": "good", "annotations": []}
    rows = {"prompt": [ASK], "chosen": [{**item, "content": [part]}], "rejected": [BAD], "reward_gap": 0.5}
    (pair,) = read(tmp_path, rows)
    assert pair.chosen[0]["content"] == "good"
    thinking = {"id": "r", "type": "reasoning", "summary": []}
    (said,) = refusals(tmp_path, {**rows, "chosen": [thinking, {**item, "content": [part]}]})
    assert "message 0 of field 'chosen' without role" in said.replace("\\'", "'") and "megadpo pairs" in said


def test_a_row_of_another_format_than_the_first_is_refused_by_its_line(tmp_path: Path) -> None:
    strings, dpo = ROWS["strings"][0], ROWS["DPODataset"][0]
    said = refusals(tmp_path, strings, dpo, strings, ranked(0, 1))
    assert [one.split(" ")[0] for one in said] == ["rows.jsonl:2:", "rows.jsonl:4:"]
    assert "a row of the format DPODataset" in said[0] and "BinaryPreferenceDataset, as in line 1" in said[0]


def test_a_named_format_is_held_to(tmp_path: Path) -> None:
    (said,) = refusals(tmp_path, {"prompt": "q", "completions": []}, dataset_name="PreferenceDataset")
    assert "no field 'context'" in said.replace('"', "")
    said_of_two = refusals(tmp_path, ROWS["strings"][0], dataset_name="DPODataset")
    assert len(said_of_two) == 2 and "chosen_response" in said_of_two[0]


def test_bad_rows_can_be_left_out_and_counted(tmp_path: Path) -> None:
    rows = [ranked(0, 1), ranked(1, 1), {"x": 1}, ranked(1, 0)]
    counts = ReadCounts()
    pairs = read(tmp_path, *rows, on_bad_row="drop", counts=counts)
    assert [(pair.place.row, pair.place.line) for pair in pairs] == [(0, 1), (3, 4)]
    assert (counts.rows, counts.dropped_bad_rows) == (4, 2)
    assert [problem.where.rpartition(":")[2] for problem in counts.bad_rows] == ["2", "3", "3"]
    assert "rank 1" in refusals(tmp_path, ranked(1, 1), on_bad_row="drop")[0], "nothing is left: an error"
    many = ReadCounts()
    assert len(read(tmp_path, ranked(0, 1), *[ranked(1, 1)] * 50, on_bad_row="drop", counts=many)) == 1
    assert many.dropped_bad_rows == 50 and len(many.bad_rows) == 20


def test_rollouts_are_sent_to_the_tool_that_makes_pairs_of_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [{"responses_create_params": {}, "reward": 1.0}])
    with pytest.raises(DataError) as refused:
        read_all(path)
    assert all("megadpo pairs" in problem.fix for problem in refused.value.problems)
