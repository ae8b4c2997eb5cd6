"""One row: both generations, and every reason not to use it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from megadpo.messages.chat import MessageError
from megadpo.rollouts.left_out import ROW_REASONS, Unusable
from megadpo.rollouts.row import RowOptions, answer_chars, parse_row
from tests.rollouts.builders import call, call_output, current, message, older, reasoning

PLAIN = RowOptions()


@pytest.mark.parametrize("make", [current, older])
@pytest.mark.parametrize("prompt", ["2 + 2?", [{"role": "user", "content": "2 + 2?"}]])
def test_both_generations_and_both_inputs_say_the_same(make, prompt):
    row = make(prompt, "4", 1, _ng_task_index=3, _ng_rollout_index=2, agent_ref={"name": "sums"})
    row["responses_create_params"]["input"] = prompt
    parsed = parse_row(row, PLAIN)
    assert parsed.prompt == [{"role": "user", "content": "2 + 2?"}]
    assert parsed.answer == [{"role": "assistant", "content": "4"}]
    assert (parsed.reward, parsed.task, parsed.rollout_index, parsed.agent) == (1.0, 3, 2, "sums")
    assert parsed.generation == ("output" if make is older else "response.output")


def test_input_at_the_top_and_output_as_text():
    parsed = parse_row({"input": "2 + 2?", "output": "4", "reward": 0.5}, PLAIN)
    assert parsed.prompt[0]["content"] == "2 + 2?" and parsed.answer[0]["content"] == "4"


def test_instructions_and_tools_are_part_of_the_prompt():
    tool = {"type": "function", "name": "f", "parameters": {}}
    parsed = parse_row(current("hi", "yes", 1, params={"instructions": "be short", "tools": [tool]}), PLAIN)
    assert [turn["role"] for turn in parsed.prompt] == ["system", "user"]
    assert parsed.tools == [{"type": "function", "function": {"name": "f", "parameters": {}}}]


def test_turns_after_the_assistants_last_are_cut_and_noted():
    parsed = parse_row(current("hi", [message("hit"), message("bust", "user")], -1), PLAIN)
    assert parsed.answer == [{"role": "assistant", "content": "hit"}] and "were removed" in parsed.notes[0]
    ends_in_call = parse_row(current("hi", [call("f", "{}"), call_output("1")], 0), PLAIN)
    assert [turn["role"] for turn in ends_in_call.answer] == ["assistant"]


def test_length_counts_what_the_assistant_wrote():
    output = [reasoning("ab"), call("f", '{"a": 1}'), call_output("a long output of a tool"), message("cde")]
    assert answer_chars(parse_row(current("hi", output, 1), PLAIN).answer) == 2 + 1 + len('{"a": 1}') + 3


GOOD = current("2 + 2?", "4", 1.0)
REFUSED = [
    ("no_reward", {key: value for key, value in GOOD.items() if key != "reward"}),
    ("no_reward", {**GOOD, "reward": None}),
    ("reward_not_a_number", {**GOOD, "reward": "1.0"}),
    ("reward_not_a_number", {**GOOD, "reward": True}),
    ("reward_not_finite", json.loads(json.dumps({**GOOD, "reward": float("nan")}))),
    ("reward_not_finite", {**GOOD, "reward": float("-inf")}),
    ("reward_not_finite", {**GOOD, "reward": 10**400}),
    ("reward_not_finite", {**GOOD, "reward": 1.7e308}),
    ("no_input", {"reward": 1, "output": "4"}),
    ("no_input", current([], "4", 1)),
    ("no_input", {**GOOD, "responses_create_params": [1]}),
    ("no_input", current([{"type": "reasoning", "summary": []}], "4", 1)),
    ("no_output", {**GOOD, "response": {"id": "x"}}),
    ("no_output", {**GOOD, "response": {"output": 5}}),
    ("both_generations", {**GOOD, "output": "5"}),
    ("failed_response", {**GOOD, "response": {"error": {"code": "server_error"}, "output": []}}),
    ("failed_response", {**GOOD, "response": {"status": "failed"}}),
    ("incomplete_response", {**GOOD, "response": {"status": "incomplete", "output": [message("4")]}}),
    ("incomplete_response", {**GOOD, "response": {"incomplete_details": {"reason": "x"}, "output": [message("4")]}}),
    ("incomplete_response", current("hi", [{**message("4"), "status": "incomplete"}], 1)),
    ("no_answer", current("hi", [], 1)),
    ("no_answer", current("hi", " \n", 1)),
    ("no_answer", current("hi", [reasoning("endless")], 0)),
    ("no_answer", current("hi", [message("hit"), message("13", "user"), reasoning("endless")], 0)),
    ("answer_begins_elsewhere", current("hi", [message("me first", "user"), message("4")], 1)),
    ("prompt_ends_in_assistant", current([message("I", "user"), message("you")], "4", 1)),
    ("unsupported_item", current("hi", [{"type": "mcp_call"}], 1)),
    ("bad_task_index", {**GOOD, "_ng_task_index": 1.5}),
]


@pytest.mark.parametrize(("reason", "row"), REFUSED)
def test_a_row_that_cannot_be_used_says_why(reason: str, row: dict):
    with pytest.raises((MessageError, Unusable)) as refused:
        parse_row(row, PLAIN)
    assert refused.value.reason == reason and str(refused.value)
    assert ROW_REASONS[reason].fix


def test_cut_answers_are_used_on_request():
    row = {**GOOD, "response": {"status": "incomplete", "output": [message("4")]}}
    assert parse_row(row, RowOptions(keep_incomplete=True)).answer[0]["content"] == "4"


@pytest.mark.parametrize(
    "row",
    [
        current([message("be short", "system"), message("hi", "user")], "4", 1),
        current("hi", [reasoning("hm"), message("4")], 1),
        current("hi", [call("f", "{}")], 1),
        current("hi", "4", 1, params={"tools": [{"type": "function", "name": "f"}]}),
    ],
)
def test_text_refuses_what_a_string_cannot_hold(row: dict):
    with pytest.raises(Unusable) as refused:
        parse_row(row, RowOptions(text=True))
    assert refused.value.reason == "not_plain_text"


def test_text_without_reasoning():
    parsed = parse_row(current("hi", [reasoning("hm"), message("4")], 1), RowOptions(text=True, keep_reasoning=False))
    assert parsed.answer == [{"role": "assistant", "content": "4"}]


FULL = current(
    [message("hi", "user"), call("f", "{}"), call_output("1")],
    [
        reasoning("hm"),
        call("f", '{"a": 1}'),
        call_output([{"type": "input_text", "text": "1"}]),
        {"role": "assistant", "content": "x", "reasoning_content": "y", "tool_calls": [{"id": "i", "function": {}}]},
        message("4"),
    ],
    1.0,
    params={"instructions": "be short", "tools": [{"type": "function", "name": "f", "parameters": {}}]},
    _ng_task_index=0,
    agent_ref={"name": "a"},
)
FULL["response"]["output"][3]["tool_calls"][0]["function"] = {"name": "f", "arguments": "{}"}


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in paths(one, (*path, key)))]


@pytest.mark.parametrize(
    "value", [None, True, 5, 0.5, "", "x", [], [5], [{}], {}, {"type": 5}, {"type": "x", "role": []}], ids=repr
)
def test_whatever_stands_anywhere_in_a_row_it_is_read_or_refused(value: object):
    for path in paths(FULL)[1:]:
        row: Any = copy.deepcopy(FULL)
        target = row
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value
        read_or_refused(row)
        del target[path[-1]]
        read_or_refused(row)


def read_or_refused(row: dict[str, Any]) -> None:
    try:
        parsed = parse_row(row, PLAIN)
    except (MessageError, Unusable):
        return
    json.dumps([parsed.prompt, parsed.tools, parsed.answer])
    assert parsed.answer[0]["role"] == parsed.answer[-1]["role"] == "assistant"
    assert all(isinstance(turn["content"], str) for turn in parsed.prompt + parsed.answer)
    assert answer_chars(parsed.answer) > 0
