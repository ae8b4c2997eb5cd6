"""What both endpoints are asked, and their answers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megadpo.collect.endpoints import chat_body, response_of_chat, responses_body
from megadpo.collect.parameters import Findings, check_params, with_seed
from megadpo.collect.rewards import answer_text

FOLDER = Path(os.environ.get("MEGADPO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
ROLLOUTS = sorted((FOLDER / "gym_rollouts").glob("*.jsonl"))


def body_of(params: dict) -> dict:
    findings = Findings("prompts.jsonl:1", [])
    check_params(params, findings)
    body = chat_body(params, findings)
    assert findings.problems == []
    return body


def problems_of(params: dict) -> str:
    findings = Findings("prompts.jsonl:1", [])
    check_params(params, findings)
    chat_body(params, findings)
    return "\n".join(map(str, findings.problems))


def test_sampling_parameters():
    params = {
        "input": "hello",
        "instructions": "Be brief.",
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 10,
        "top_logprobs": 2,
        "reasoning": {"effort": "low", "summary": None},
        "text": {"format": {"type": "json_schema", "name": "a", "schema": {}, "strict": True}},
        "metadata": {"extra_body": '{"top_k": 20}', "label": "x"},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "stream": None,
        "truncation": "disabled",
    }
    assert body_of(params) == {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 10,
        "logprobs": True,
        "top_logprobs": 2,
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}, "strict": True}},
        "top_k": 20,
    }


def test_turns_with_reasoning_calls_and_their_outputs():
    items = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "think"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "calling"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:1"}]},
    ]
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id_, name in (("1", "f"), ("2", "g"))
    ]
    first = {"role": "assistant", "reasoning": "think", "reasoning_content": "think", "content": "calling"}
    assert body_of({"input": items})["messages"] == [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "ab"},
        {**first, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
        {"role": "assistant", "content": "done"},
        {"role": "assistant", "content": "really"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:1"}}]},
    ]


def test_tools():
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False, "description": None}
    body = body_of({"input": "x", "tools": [tool], "tool_choice": {"type": "function", "name": "f"}})
    assert body["tools"] == [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": False}}
    ]
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"input": ""}, "input: got ''"),
        ({"input": [{"role": "martian", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"input": [17]}, "input[0]: got 17"),
        ({"input": "x", "temprature": 1}, "did you mean temperature?"),
        ({"input": "x", "top_k": 1}, "metadata.extra_body"),
        ({"input": "x", "temperature": "hot"}, "temperature: got 'hot'"),
        ({"input": "x", "top_p": 1.5}, "a number from 0 to 1"),
        ({"input": "x", "max_output_tokens": 0}, "whole number >= 1"),
        ({"input": "x", "stream": True}, "stream: got True"),
        ({"input": "x", "model": "gpt"}, "policy_model_name"),
        ({"input": "x", "truncation": "auto"}, "use policy_api=responses"),
        ({"input": "x", "text": {"verbosity": "low"}}, "verbosity"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools"),
        ({"input": "x", "metadata": {"extra_body": "{"}}, "a JSON object as text"),
        ({"input": "x", "metadata": {"extra_body": '{"n": 3}'}}, "no n"),
    ],
)
def test_what_cannot_be_asked_is_named(params, said):
    found = problems_of(params)
    assert said in found and "prompts.jsonl:1: responses_create_params" in found


def test_the_seed_joins_what_is_in_the_extra_body():
    params = with_seed({"input": "x", "metadata": {"extra_body": '{"top_k": 5}', "label": "a"}}, 3)
    assert json.loads(params["metadata"]["extra_body"]) == {"top_k": 5, "seed": 3}
    body = responses_body({**params, "top_p": None})
    assert body == {"input": "x", "metadata": {"label": "a"}, "top_k": 5, "seed": 3}


def completion(message: dict, reason: str = "stop", **more: object) -> dict:
    return {"choices": [{"message": message, "finish_reason": reason}], "model": "m", "created": 5, **more}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_an_answer_with_reasoning(name):
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
    response = response_of_chat(completion({"content": "yes", name: "hm"}, usage=usage), {"temperature": 0.5})
    assert [item["type"] for item in response["output"]] == ["reasoning", "message"]
    assert response["output"][0]["summary"] == [{"text": "hm", "type": "summary_text"}]
    assert answer_text({"response": response}) == "yes"
    assert (response["status"], response["temperature"], response["created_at"]) == ("completed", 0.5, 5.0)
    assert response["usage"]["total_tokens"] == 7 and response["usage"]["input_tokens_details"] == {"cached_tokens": 2}


def test_calls_cut_answers_and_empty_ones():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (item,) = response_of_chat(completion({"content": None, "tool_calls": [call]}, "tool_calls"), {})["output"]
    assert (item["type"], item["name"], item["arguments"], item["call_id"]) == ("function_call", "f", '{"a": 1}', "c1")
    cut = response_of_chat(completion({"content": "and th"}, "length"), {})
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (empty,) = response_of_chat(completion({"content": None}), {})["output"]
    assert empty["content"][0]["text"] == ""


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "x"}]}])
def test_an_answer_of_another_form_is_no_answer(answer):
    with pytest.raises(ValueError, match="without choices"):
        response_of_chat(answer, {})


@pytest.mark.skipif(not ROLLOUTS, reason=f"no {FOLDER}/gym_rollouts: set MEGADPO_DATA to the folder that holds it")
@pytest.mark.parametrize("path", ROLLOUTS, ids=lambda path: path.stem)
def test_prompts_of_nemo_gyms_environments_can_be_asked(path):
    for line in path.read_text().splitlines():
        params = json.loads(line)["responses_create_params"]
        body = body_of(params)
        assert len(body["messages"]) == len(params["input"])
        assert len(body.get("tools", [])) == len(params["tools"])
