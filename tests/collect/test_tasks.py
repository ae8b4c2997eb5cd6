"""The file of prompts: what is taken, and that every problem is said at once."""

from __future__ import annotations

import json

import pytest

from megadpo.collect.options import parse_options
from megadpo.collect.tasks import MOST_PROBLEMS, read_tasks
from megadpo.config.problems import DataError
from megadpo.files.jsonl import to_line
from tests.collect.test_options import given


def tasks_of(folder, *lines: object, **options: object):
    path = folder / "prompts.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else to_line(line) for line in lines))
    return read_tasks(parse_options(given(input_jsonl_fpath=path, output_jsonl_fpath=folder / "out", **options)))


def prompt(text: str, **fields: object) -> dict:
    return {"responses_create_params": {"input": text, "temperature": 1.0}, **fields}


def test_options_go_over_the_rows_own_parameters(tmp_path):
    extra = '{"top_k":20}'
    options = {"responses_create_params.temperature": 0.5, "responses_create_params.metadata.extra_body": extra}
    tasks = tasks_of(tmp_path, prompt("a", agent_ref={"name": "own"}), prompt("b"), agent_name="given", **options)
    params = tasks.tasks[0].row["responses_create_params"]
    assert params["temperature"] == 0.5 and json.loads(params["metadata"]["extra_body"]) == {"top_k": 20}
    assert [task.row["agent_ref"]["name"] for task in tasks.tasks] == ["own", "given"]


def test_task_indices_of_the_rows_are_kept(tmp_path):
    tasks = tasks_of(tmp_path, prompt("a", _ng_task_index=7), prompt("b", _ng_task_index=2), num_repeats=2)
    assert [(task.index, task.repeats) for task in tasks.tasks] == [(2, 2), (7, 2)] and tasks.rollouts == 4


def test_every_problem_of_the_file_at_once(tmp_path):
    lines = [
        prompt("good"),
        b"{broken\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"responses_create_params": {"input": "x"}, "expected": NaN}\n',
        b'{"responses_create_params": {"input": "\\ud800"}}\n',
        {"prompt": "x"},
        prompt("x", reward=1.0),
        {"responses_create_params": {"input": []}},
        {"responses_create_params": {"input": "x", "stream": True}},
        prompt("x", _ng_task_index=-1),
    ]
    with pytest.raises(DataError) as refusal:
        tasks_of(tmp_path, *lines)
    said = [str(problem) for problem in refusal.value.problems]
    for number in range(2, len(lines) + 1):
        assert any(f"prompts.jsonl:{number}" in one for one in said), number
    assert not any("prompts.jsonl:1:" in one for one in said)


def test_one_index_for_two_prompts(tmp_path):
    with pytest.raises(DataError, match="prompts.jsonl:2: _ng_task_index.*prompts.jsonl:1"):
        tasks_of(tmp_path, prompt("a", _ng_task_index=1), prompt("b", _ng_task_index=1))
    with pytest.raises(DataError, match="in all rows or in none"):
        tasks_of(tmp_path, prompt("a", _ng_task_index=1), prompt("b"))


def test_empty_missing_and_hopeless_files(tmp_path):
    with pytest.raises(DataError, match="a file without rows"):
        tasks_of(tmp_path, b"\n\n")
    with pytest.raises(DataError, match="No such file"):
        read_tasks(parse_options(given(input_jsonl_fpath=tmp_path / "none")))
    with pytest.raises(DataError) as refusal:
        tasks_of(tmp_path, *[b"{\n"] * 100)
    assert len(refusal.value.problems) == MOST_PROBLEMS + 1
