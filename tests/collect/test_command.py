"""The collection against a real server: order, faults, and what is written."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from megadpo.collect.journal import Journal
from megadpo.config.problems import ConfigError, DataError
from tests.collect.policy_server import Fault, PolicyServer
from tests.collect.runs import read, run, write_prompts

AABBCC = [(task, rollout) for task in range(4) for rollout in range(3)]


def keys(rows: list[dict]) -> list[tuple[int, int]]:
    return [(row["_ng_task_index"], row["_ng_rollout_index"]) for row in rows]


@pytest.mark.parametrize("api", ["chat_completions", "responses"])
def test_rows_are_those_of_nemo_gym_in_order(tmp_path, capsys, api):
    write_prompts(tmp_path / "prompts.jsonl", 4)
    options = {"responses_create_params.temperature": 0.7, "responses_create_params.max_output_tokens": 64}
    with PolicyServer() as server:
        # The first prompt is slow: it finishes last, and is first in the file.
        server.faults["prompt 0", 0] = [Fault(503, delay_s=0.2)]
        assert run(tmp_path, server, agent_name="my_agent", policy_api=api, **options) == 0
    rows = read(tmp_path / "rollouts.jsonl")
    assert keys(rows) == AABBCC
    for row in rows:
        answer = f"prompt {row['_ng_task_index']} -> {row['_ng_rollout_index']}"
        assert row["response"]["output"][-1]["content"][0]["text"] == answer
        assert row["reward"] == row["_ng_rollout_index"] / 4
        assert row["agent_ref"] == {"name": "my_agent"}
        assert row["expected"] == "prompt"
        seed = json.dumps({"seed": row["_ng_rollout_index"]})
        assert row["responses_create_params"] == {
            "input": f"prompt {row['_ng_task_index']}",
            "temperature": 0.7,
            "max_output_tokens": 64,
            "metadata": {"extra_body": seed},
        }
    limit = "max_tokens" if api == "chat_completions" else "max_output_tokens"
    assert all(body[limit] == 64 and body["temperature"] == 0.7 and body["model"] == "tiny" for body in server.bodies)
    assert set(server.paths) == {"/v1/" + api.replace("_", "/")}
    out = capsys.readouterr().out
    assert "Repeating rows (in a pattern of abc to aabbcc) from 4 to 12!" in out
    assert "mean reward 0.2500; 4 of 4 prompts have answers with different rewards" in out


def test_every_fault_that_may_pass_is_tried_again(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 4)
    with PolicyServer() as server:
        server.faults["prompt 0", 0] = [Fault(500), Fault(503), Fault(502)]
        server.faults["prompt 0", 1] = [Fault(None), Fault(None)]
        server.faults["prompt 1", 0] = [Fault(200, half_body=True)]
        server.faults["prompt 1", 1] = [Fault(200, body=b"<html>a proxy's page</html>")]
        server.faults["prompt 2", 2] = [Fault(429, headers={"Retry-After": "0"})]
        server.faults["prompt 3", 2] = [Fault(408), Fault(425)]
        assert run(tmp_path, server) == 0
    assert keys(read(tmp_path / "rollouts.jsonl")) == AABBCC
    assert server.asked["prompt 0", 0] == 4 and server.asked["prompt 0", 1] == 3 and server.asked["prompt 3", 2] == 3
    assert all(times == 1 for times in server.answered.values()) and len(server.answered) == 12
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "prompts.jsonl",
        "rollouts.jsonl",
        "rollouts.jsonl.journal",
    ]


def test_a_request_without_an_answer_in_time_is_sent_again(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 1)
    with PolicyServer() as server:
        server.faults["prompt 0", 0] = [Fault(400, delay_s=2.5)]
        began = time.monotonic()
        assert run(tmp_path, server, num_repeats=1, request_timeout_s=1.0) == 0
    assert server.asked["prompt 0", 0] >= 2 and time.monotonic() - began > 1.0


def test_retry_after_is_waited_for(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 1)
    with PolicyServer() as server:
        server.faults["prompt 0", 0] = [Fault(429, headers={"Retry-After": "1"})]
        began = time.monotonic()
        assert run(tmp_path, server, num_repeats=1) == 0
    assert time.monotonic() - began > 1.0


def test_what_fails_for_good_is_written_aside_and_asked_again_alone(tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl", 4)
    with PolicyServer() as server:
        server.faults["prompt 1", 1] = [Fault(400, body=b'{"error": {"message": "too long"}}')]
        server.faults["prompt 2", 0] = [Fault(500)] * 3
        assert run(tmp_path, server, max_attempts=3) == 1
        failed = {keys([row])[0]: row for row in read(tmp_path / "rollouts_failures.jsonl")}
        assert failed.keys() == {(1, 1), (2, 0)}
        assert failed[1, 1]["failure"] == {"reason": "HTTP 400: too long", "status": 400, "attempts": 1}
        assert failed[2, 0]["failure"]["attempts"] == 3 and failed[2, 0]["_ng_failure_class"] == "request"
        assert keys(read(tmp_path / "rollouts.jsonl")) == [key for key in AABBCC if key not in failed]
        assert "missing: 2 of 12 rollouts" in capsys.readouterr().out
        before = server.asked.copy()
        assert run(tmp_path, server, max_attempts=3) == 0
    assert server.asked - before == {("prompt 1", 1): 1, ("prompt 2", 0): 1}
    assert keys(read(tmp_path / "rollouts.jsonl")) == AABBCC
    assert not (tmp_path / "rollouts_failures.jsonl").exists()


def test_a_server_that_only_fails_is_not_asked_for_everything(tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl", 40)
    with PolicyServer(always=Fault(500)) as server:
        assert run(tmp_path, server, max_attempts=2, stop_after_failures=8) == 1
    assert server.asked.total() <= 2 * (8 + 3)
    assert not (tmp_path / "rollouts.jsonl").exists()
    assert "stopped early" in capsys.readouterr().out


def test_no_more_requests_at_once_than_asked_for(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 4)
    with PolicyServer(delay_s=0.03) as server:
        assert run(tmp_path, server, num_samples_in_parallel=3) == 0
    assert 2 <= server.most_in_flight <= 3


def test_a_failed_reward_keeps_the_answer(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 2)
    name = "tests.collect.reward_functions:never_for_seed_1"
    with PolicyServer() as server:
        assert run(tmp_path, server, reward_function=name) == 1
        failed = read(tmp_path / "rollouts_failures.jsonl")
        assert {row["_ng_failure_class"] for row in failed} == {"reward"} and len(failed) == 2
        assert "'nan'" in failed[0]["failure"]["reason"]
        assert run(tmp_path, server, reward_function=name) == 1
    assert all(times == 1 for times in server.asked.values()) and len(server.asked) == 6
    assert len(read(tmp_path / "rollouts.jsonl")) == 4


def test_rewards_of_a_resources_server(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 2)
    with PolicyServer() as server:
        server.faults["/verify", None] = [Fault(500), Fault(None)]
        assert run(tmp_path, server, reward_function=None, resources_server_url=server.url) == 0
    rows = read(tmp_path / "rollouts.jsonl")
    assert [row["reward"] for row in rows] == [1.0] * 6 and rows[0]["extracted"] == "prompt 0 -> 0"
    assert (
        len(server.verified) == 8 and {"responses_create_params", "response", "expected"} <= server.verified[0].keys()
    )
    assert all(times == 1 for times in server.asked.values())


def test_a_masked_sample_has_no_reward_and_is_verified_again(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 1)
    options = {"reward_function": None, "num_samples_in_parallel": 1}
    with PolicyServer(masked=1) as server:
        assert run(tmp_path, server, resources_server_url=server.url, **options) == 1
        (failed,) = read(tmp_path / "rollouts_failures.jsonl")
        assert "the judge was away" in failed["failure"]["reason"]
        assert run(tmp_path, server, resources_server_url=server.url, **options) == 0
    assert [row["reward"] for row in read(tmp_path / "rollouts.jsonl")] == [1.0] * 3
    assert server.asked.total() == 3 and len(server.verified) == 4


def test_stopped_between_the_output_and_the_end(tmp_path, monkeypatch):
    write_prompts(tmp_path / "prompts.jsonl", 2)
    with PolicyServer() as server:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "mark_finished", lambda journal: None)
            assert run(tmp_path, server) == 0
        written = (tmp_path / "rollouts.jsonl").read_bytes()
        (tmp_path / "rollouts.jsonl").write_text("half of it")
        assert run(tmp_path, server) == 0
    assert (tmp_path / "rollouts.jsonl").read_bytes() == written and server.asked.total() == 6


def test_an_async_reward_function_with_further_fields(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 1)
    with PolicyServer() as server:
        assert run(tmp_path, server, reward_function="tests.collect.reward_functions:later") == 0
    row = read(tmp_path / "rollouts.jsonl")[0]
    assert row["reward"] == 1.0 and row["length"] == 5 and row["response"]["output"]


def test_equal_lines_are_one_task_and_limit_counts_rows(tmp_path):
    lines = [f'{{"responses_create_params": {{"input": "{name}"}}}}\n' for name in "abac"]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    with PolicyServer() as server:
        assert run(tmp_path, server, num_repeats=2, limit=3) == 0
    rows = read(tmp_path / "rollouts.jsonl")
    assert keys(rows) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]
    assert [row["responses_create_params"]["input"] for row in rows] == ["a"] * 4 + ["b"] * 2


def test_the_key_goes_to_the_model_server_and_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    write_prompts(tmp_path / "prompts.jsonl", 1)
    with PolicyServer() as server:
        server.faults["prompt 0", 1] = [Fault(400, body=b'{"error": {"message": "bad key sk-very-secret"}}')]
        server.faults["prompt 0", 0] = [Fault(500, body=b'{"error": {"message": "bad key sk-very-secret"}}')]
        options = {"reward_function": None, "resources_server_url": server.url}
        assert run(tmp_path, server, policy_api_key_env="MY_KEY", **options) == 1
    sent = [headers.get("Authorization") for headers in server.headers]
    assert sent.count("Bearer sk-very-secret") == 4 and sent.count(None) == len(server.verified) == 2
    shown = capsys.readouterr()
    assert "bad key (key)" in shown.out and "sk-very-secret" not in shown.out + shown.err
    assert all(b"sk-very-secret" not in one.read_bytes() for one in tmp_path.iterdir())


def refused(folder: Path, server: PolicyServer | str, **options: object) -> str:
    with pytest.raises((ConfigError, DataError)) as refusal:
        run(folder, server, **options)
    return str(refusal.value)


def test_a_finished_collection_is_left_alone_and_a_changed_one_refused(tmp_path, capsys):
    write_prompts(tmp_path / "prompts.jsonl", 2)
    with PolicyServer() as server:
        assert run(tmp_path, server) == 0
        asked = server.asked.total()
        assert run(tmp_path, server) == 0 and "nothing to do" in capsys.readouterr().out
        said = refused(tmp_path, server, num_repeats=4, **{"responses_create_params.temperature": 0.2})
        assert "num_repeats: got 4; expected 3, the value with which this output was started" in said
        assert "responses_create_params.temperature: got 0.2; expected None" in said
        write_prompts(tmp_path / "prompts.jsonl", 3)
        assert "sha256" in refused(tmp_path, server)
        assert server.asked.total() == asked
        assert run(tmp_path, server, resume_from_cache="false") == 0
        (tmp_path / "rollouts.jsonl").unlink()
        assert "doesn't exist" in refused(tmp_path, server)
    assert server.asked.total() == asked + 9


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 1)
    (tmp_path / "rollouts.jsonl").write_text("dear diary\n")
    with PolicyServer() as server:
        assert "a file of this collection" in refused(tmp_path, server)
        (tmp_path / "rollouts.jsonl").unlink()
        (tmp_path / "rollouts.jsonl.journal").write_text("dear diary")
        assert "another kind of file" in refused(tmp_path, server)
    assert (tmp_path / "rollouts.jsonl.journal").read_text() == "dear diary"


def test_the_server_is_asked_for_its_model_first(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", 1)
    with PolicyServer(model="llama") as server:
        assert "expected one of llama" in refused(tmp_path, server, policy_model_name="qwen")
        url = server.url
    said = refused(tmp_path, url)
    assert "policy_base_url: got" in said and "a server that answers" in said
    assert sorted(one.name for one in tmp_path.iterdir()) == ["prompts.jsonl"]
