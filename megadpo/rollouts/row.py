"""Parses a row of a rollouts file: prompt, answer and reward.

Current rows have the answer in `response.output`, older rows in `output`. In both, the prompt is
`responses_create_params.input` (or `input`): a text or a list of items.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from megadpo.files.jsonl import type_name
from megadpo.messages.chat import ChatMessage, tool
from megadpo.messages.responses import to_messages
from megadpo.rollouts.left_out import Unusable

Generation: TypeAlias = Literal["response.output", "output"]
TaskIndex: TypeAlias = int | str

_MOST_REWARD = sys.float_info.max / 2  # then the gap of two rewards is finite


@dataclass(frozen=True)
class RowOptions:
    """How rows are read."""

    keep_reasoning: bool = True
    keep_incomplete: bool = False
    """Use answers that were cut at max_output_tokens."""
    text: bool = False
    """Only rows that plain strings can hold: one user message, and an answer of text."""


@dataclass(frozen=True)
class ParsedRow:
    """The content of a row."""

    prompt: list[ChatMessage]
    tools: list[dict[str, Any]]
    answer: list[ChatMessage]
    reward: float
    generation: Generation
    task: TaskIndex | None
    rollout_index: int | None
    agent: str
    """Name of the agent of the rollout, or "". Rewards of different agents can't be compared."""
    notes: list[str] = field(default_factory=list)


def parse_row(row: Mapping[str, Any], options: RowOptions) -> ParsedRow:
    """Raises Unusable or MessageError for the first problem of the row."""
    reward = _reward(row)
    prompt, tools = _prompt(row, options)
    generation, response = _response(row)
    _require_complete(response, options)
    answer, notes = _answer(response["output"], options)
    if options.text:
        _require_text(prompt, tools, answer)
    agent = row.get("agent_ref")
    index = row.get("_ng_rollout_index")
    return ParsedRow(
        prompt=prompt,
        tools=tools,
        answer=answer,
        reward=reward,
        generation=generation,
        task=_task(row),
        rollout_index=index if isinstance(index, int) else None,
        agent=str(agent.get("name", "")) if isinstance(agent, Mapping) else "",
        notes=notes,
    )


def answer_chars(answer: list[ChatMessage]) -> int:
    """Characters of the assistant's content, reasoning and tool calls, without turns of tools and users."""
    total = 0
    for message in answer:
        if message["role"] == "assistant":
            total += len(message["content"]) + len(message.get("reasoning_content", ""))
            for call in message.get("tool_calls", ()):
                function = call["function"]
                total += len(function["name"]) + len(json.dumps(function["arguments"], ensure_ascii=False))
    return total


def as_text(messages: list[ChatMessage]) -> str:
    """The messages' contents, joined by spaces as in NeMo Gym's DPO guide."""
    return " ".join(message["content"] for message in messages)


def _reward(row: Mapping[str, Any]) -> float:
    if row.get("reward") is None:
        raise Unusable("no_reward", "reward null" if "reward" in row else "no field 'reward'")
    reward = row["reward"]
    if isinstance(reward, bool) or not isinstance(reward, int | float):
        raise Unusable("reward_not_a_number", f"reward {reward!r} of type {type_name(reward)}")
    try:
        value = float(reward)
    except OverflowError:
        value = math.inf
    if not abs(value) <= _MOST_REWARD:
        raise Unusable("reward_not_finite", f"reward {value}")
    return value


def _task(row: Mapping[str, Any]) -> TaskIndex | None:
    task = row.get("_ng_task_index")
    if task is None:
        return None
    if isinstance(task, bool) or not isinstance(task, int | str):
        raise Unusable("bad_task_index", f"_ng_task_index {task!r}")
    return task


def _prompt(row: Mapping[str, Any], options: RowOptions) -> tuple[list[ChatMessage], list[dict[str, Any]]]:
    params = row.get("responses_create_params")
    if params is None:
        params = row
    if not isinstance(params, Mapping):
        raise Unusable("no_input", f"responses_create_params of type {type_name(params)}")
    given = params.get("input")
    if not isinstance(given, str | list) or not given:
        raise Unusable("no_input", f"input {given!r}" if "input" in params else "no field 'input'")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    instructions = params.get("instructions")
    if instructions:
        items = [{"role": "system", "content": instructions}, *items]
    messages, _ = to_messages(items, "input", keep_reasoning=options.keep_reasoning)
    if not messages:
        raise Unusable("no_input", "an input without messages")
    if messages[-1]["role"] == "assistant":
        raise Unusable("prompt_ends_in_assistant", "an input whose last message is the assistant's")
    tools = params.get("tools") or []
    if not isinstance(tools, list):
        raise Unusable("unsupported_item", f"tools of type {type_name(tools)}")
    return messages, [tool(given, f"tools[{number}]") for number, given in enumerate(tools)]


def _response(row: Mapping[str, Any]) -> tuple[Generation, Mapping[str, Any]]:
    """The kind of row, and the object whose `output` is the answer."""
    response = row.get("response")
    current = isinstance(response, Mapping) and response.get("output") is not None
    older = row.get("output") is not None
    if current and older:
        raise Unusable("both_generations", "both response.output and output")
    if isinstance(response, Mapping) and current:
        return "response.output", response
    if older:
        return "output", row
    if isinstance(response, Mapping):
        _require_no_error(response)
    raise Unusable("no_output", "neither response.output nor output")


def _require_no_error(response: Mapping[str, Any]) -> None:
    if response.get("error") is not None or response.get("status") in ("failed", "cancelled"):
        error = json.dumps(response.get("error"), default=str)[:120]
        raise Unusable("failed_response", f"status {response.get('status')!r}, error {error}")


def _require_complete(response: Mapping[str, Any], options: RowOptions) -> None:
    _require_no_error(response)
    if options.keep_incomplete:
        return
    details = response.get("incomplete_details")
    output = response["output"]
    items = output if isinstance(output, list) else []
    cut = any(isinstance(item, Mapping) and item.get("status") == "incomplete" for item in items)
    if cut or details is not None or response.get("status") == "incomplete":
        raise Unusable("incomplete_response", f"an incomplete answer, {json.dumps(details, default=str)[:120]}")


def _answer(output: object, options: RowOptions) -> tuple[list[ChatMessage], list[str]]:
    if isinstance(output, str):
        output = [{"role": "assistant", "content": output}]
    if not isinstance(output, list):
        raise Unusable("no_output", f"output of type {type_name(output)}")
    answer, textless = to_messages(output, "output", keep_reasoning=options.keep_reasoning)
    notes = ["answers have reasoning items without text (encrypted, or not returned)"] if textless else []
    if answer and answer[-1]["role"] != "assistant" and any(message["role"] == "assistant" for message in answer):
        notes.append("answers have turns after the assistant's last turn; these were removed")
        while answer[-1]["role"] != "assistant":
            answer.pop()
    if not answer or not (answer[-1]["content"].strip() or answer[-1].get("tool_calls")):
        in_reasoning = answer and "reasoning_content" in answer[-1]
        raise Unusable("no_answer", "an answer that ends with reasoning" if in_reasoning else "an empty answer")
    if answer[0]["role"] != "assistant":
        raise Unusable("answer_begins_elsewhere", f"an answer that begins with the role {answer[0]['role']!r}")
    return answer, notes


def _require_text(prompt: list[ChatMessage], tools: list[dict[str, Any]], answer: list[ChatMessage]) -> None:
    if [message["role"] for message in prompt] != ["user"] or tools:
        roles = ", ".join(message["role"] for message in prompt[:4])
        raise Unusable("not_plain_text", f"an input of the roles {roles}" + (" with tools" if tools else ""))
    for message in answer:
        if set(message) != {"role", "content"} or message["role"] != "assistant":
            raise Unusable("not_plain_text", f"an answer with a message of {', '.join(message)}")
