"""docs/collecting.md does what it says."""

from __future__ import annotations

import dataclasses
import re

from megadpo.collect.options import CollectOptions
from tests.collect.policy_server import PolicyServer
from tests.collect.runs import read, start
from tests.helpers.distributed import REPOSITORY

DOCUMENT = (REPOSITORY / "docs" / "collecting.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(found)


def test_its_command_with_its_prompts_and_its_reward(tmp_path):
    (tmp_path / "prompts.jsonl").write_text(block("json"))
    (tmp_path / "rewards.py").write_text(block("python"))
    (command,) = re.findall(r"collect_rollouts.py \\\n((?: +\+.*\n)+)", DOCUMENT)
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
