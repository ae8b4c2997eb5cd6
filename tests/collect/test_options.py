"""Options: what is taken, and that every problem is said at once."""

from __future__ import annotations

import pytest

from megadpo.collect.options import parse_options
from megadpo.config.problems import ConfigError

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
        ({"policy_base_url": "http://localhost:8000/v1/chat/completions"}, "remove this ending"),
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
