"""Options and input file: what is taken, and that every problem is said at once."""

from __future__ import annotations

import json

import pytest

from megadpo.collect.options import parse_options
from megadpo.collect.rewards import load_reward_function, with_reward
from megadpo.collect.tasks import MOST_PROBLEMS, read_tasks
from megadpo.config.problems import ConfigError, DataError
from megadpo.files.jsonl import to_line

GOOD = {
    "input_jsonl_fpath": "dpo_prompts.jsonl",
    "output_jsonl_fpath": "dpo_rollouts.jsonl",
    "policy_base_url": "http://localhost:8000/v1",
    "reward_function": "rewards:score",
}


def given(**options: object) -> list[str]:
    return [f"{name}={value}" for name, value in (GOOD | options).items() if value is not None]


def problems_of(*arguments: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        parse_options(arguments)
    return str(refusal.value)


def test_the_options_of_ng_collect_rollouts():
    options = parse_options(
        [
            "+agent_name=my_agent",
            "+input_jsonl_fpath=dpo_prompts.jsonl",
            "+output_jsonl_fpath=results/dpo_rollouts.jsonl",
            "+responses_create_params.temperature=0.8",
            "+responses_create_params.top_p=1e-1",
            "+num_repeats=4",
            "+num_samples_in_parallel=10",
            "+num_repeats_add_seed=true",
            "++limit=100",
            "policy_base_url=http://localhost:8000/v1",
            "resources_server_url=http://localhost:11000",
        ]
    )
    assert options.responses_create_params == {"temperature": 0.8, "top_p": 0.1}
    assert (options.num_repeats, options.num_samples_in_parallel, options.limit) == (4, 10, 100)
    assert options.agent_name == "my_agent" and options.num_repeats_add_seed
    assert str(options.journal) == "results/dpo_rollouts.jsonl.journal"
    assert str(options.failures) == "results/dpo_rollouts_failures.jsonl"


def test_every_problem_at_once():
    said = problems_of("num_repeats=0", "limit=all", "num_repeat=2", "temperature=1", "policy_api=chat", "loose")
    for field in (
        "input_jsonl_fpath",
        "output_jsonl_fpath",
        "policy_base_url",
        "reward_function, resources_server_url",
    ):
        assert f"{field}: got None" in said
    for part in ("num_repeats: got 0", "limit: got 'all'", "did you mean num_repeats", "policy_api: got 'chat'"):
        assert part in said
    assert "responses_create_params.temperature=1" in said and "command line: got 'loose'" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy_base_url": "localhost:8000"}, "policy_base_url: got 'localhost:8000'"),
        ({"policy_base_url": "http://localhost:99999/v1"}, "policy_base_url"),
        ({"policy_base_url": "http://localhost:8000/v1/chat/completions"}, "leave that ending out"),
        ({"resources_server_url": "http://localhost:1"}, "exactly one of the two"),
        ({"output_jsonl_fpath": "dpo_prompts.jsonl"}, "another file than input_jsonl_fpath"),
        ({"output_jsonl_fpath": "/dev/null/x.jsonl"}, "can't be written"),
        ({"policy_api_key_env": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
    ],
)
def test_one_problem_each(options, said):
    assert said in problems_of(*given(**options))


@pytest.mark.parametrize("argument", ["policy_api_key=sk-secret", "api_key=sk-secret", "policy_api_key_env=sk-secret"])
def test_a_key_on_the_command_line_is_refused_and_not_repeated(argument):
    assert "sk-secret" not in problems_of(*given(), argument)


def test_credentials_are_not_repeated_and_a_key_with_a_line_end_is_refused(monkeypatch):
    assert "hunter2" not in problems_of(*given(policy_base_url="http://me:hunter2@host/v1"))
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    said = problems_of(*given(policy_api_key_env="MY_KEY"))
    assert "printable" in said and "sk-secret" not in said


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


@pytest.mark.parametrize(
    "name", ["rewards", "rewards.py:score", "no_such_module:score", "json:no_such", "json:__doc__"]
)
def test_a_reward_function_that_is_not_there(name):
    with pytest.raises(ConfigError, match="reward_function"):
        load_reward_function(name)


def test_a_reward_is_a_finite_number():
    assert with_reward({"reward": True, "why": "x"}, "f") == {"reward": 1.0, "why": "x"}
    for bad in (None, "1", float("inf"), [1], {}):
        with pytest.raises(Exception, match="expected a finite number"):
            with_reward({"reward": bad}, "f")
    for bad in ({1, 2}, float("nan"), object()):
        with pytest.raises(Exception, match="no JSON"):
            with_reward({"reward": 1.0, "field": bad}, "f")
