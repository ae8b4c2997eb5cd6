"""`megadpo collect` as a user starts it: docs/collecting.md does what it says, and after a kill -9 in the middle
nothing that was finished is asked for again."""

from __future__ import annotations

import dataclasses
import re
import signal

import pytest

from megadpo.collect.options import CollectOptions
from tests.collect.policy_server import Fault, PolicyServer
from tests.collect.runs import journaled, kill, read, run, start, wait_for, write_prompts
from tests.helpers.distributed import REPOSITORY

PROMPTS, REPEATS = 8, 3
ALL = [(task, rollout) for task in range(PROMPTS) for rollout in range(REPEATS)]


@pytest.mark.parametrize("torn", [b"", b'{"responses_create_params": {"inp', b"\0" * 100], ids=["", "torn", "zeros"])
def test_killed_twice_and_finished(tmp_path, torn):
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    journal = tmp_path / "rollouts.jsonl.journal"
    with PolicyServer(delay_s=0.05) as server:
        server.faults["prompt 3", 1] = [Fault(500), Fault(None)]
        for wanted in (5, 14):
            process = start(tmp_path, server)
            wait_for(lambda wanted=wanted: len(journaled(tmp_path)) >= wanted)
            kill(process)
            wait_for(lambda: server.in_flight == 0)
            finished = journaled(tmp_path)
            assert not (tmp_path / "rollouts.jsonl").exists()
            with journal.open("ab") as file:
                file.write(torn)
            asked_before = server.asked.copy()
        lines_before = set(journal.read_bytes().splitlines())
        assert 14 <= len(finished) < len(ALL)
        assert run(tmp_path, server) == 0
        asked_since = server.asked - asked_before
    again = {(int(prompt.split()[1]), seed) for prompt, seed in asked_since}
    assert again == set(ALL) - finished
    rows = read(tmp_path / "rollouts.jsonl")
    assert [(row["_ng_task_index"], row["_ng_rollout_index"]) for row in rows] == ALL
    written = set((tmp_path / "rollouts.jsonl").read_bytes().splitlines())
    assert len(written & lines_before) == len(finished)  # the finished rows themselves, not new answers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_in_order(tmp_path, number, code):
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    with PolicyServer(delay_s=0.05) as server:
        process = start(tmp_path, server)
        wait_for(lambda: server.answered.total() >= 5)
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
        assert (process.returncode, error) == (code, "")
        assert "the same command continues from there" in out
        # An answer whose reward was under way is kept as well.
        kept = len((tmp_path / "rollouts.jsonl.journal").read_text().splitlines()) - 1
        assert kept >= len(journaled(tmp_path)) >= 1
        asked = server.asked.total()
        assert run(tmp_path, server) == 0
    assert server.asked.total() == asked + len(ALL) - kept


def test_a_second_collector_with_the_same_output_is_refused(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    with PolicyServer(delay_s=0.3) as server:
        first = start(tmp_path, server)
        wait_for(lambda: server.asked.total() > 0)
        second = start(tmp_path, server)
        _, error = second.communicate(timeout=30)
        assert second.returncode == 2 and "no other collector with this output" in error
        assert first.poll() is None
        kill(first)


def test_problems_of_options_and_file_come_at_once_with_exit_code_2(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\nnot json\n')
    process = start(tmp_path, "http://127.0.0.1:9", reward_function="nowhere:f")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    for said in ("refused, 3 problem(s):", "prompts.jsonl:1: responses_create_params", "prompts.jsonl:2", "nowhere:f"):
        assert said in error


DOCUMENT = (REPOSITORY / "docs" / "collecting.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(found)


def test_its_command_with_its_prompts_and_its_reward(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(block("json"))
    (tmp_path / "rewards.py").write_text(block("python"))
    (command,) = re.findall(r"megadpo collect \\\n((?: +\+.*\n)+)", DOCUMENT)
    extra = re.findall(r"'\+(.*extra_body)=(.*)'", DOCUMENT)[0]
    options = dict(line.strip(" \\+").split("=", 1) for line in command.splitlines()) | dict([extra])
    options |= {"num_repeats": 5}  # the server answers "<prompt> -> <seed>": seed 4 is right for 2 + 2
    with PolicyServer() as server:
        process = start(tmp_path, server, **options | {"policy_base_url": f"{server.url}/v1"})
        out, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, ""), out
    assert [row["reward"] for row in read(tmp_path / "rollouts.jsonl")] == [0.0] * 9 + [1.0]
    for body in server.bodies:
        assert (body["temperature"], body["top_p"], body["max_tokens"], body["top_k"]) == (0.8, 0.95, 1024, 20)
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert sorted(len(body["messages"]) for body in server.bodies) == [1] * 5 + [2] * 5


def test_every_option_is_in_it():
    table = DOCUMENT.partition("## Options")[2]
    for field in dataclasses.fields(CollectOptions):
        assert f"`{field.name}" in table, field.name
