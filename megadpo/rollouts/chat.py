"""Items of OpenAI's Responses API -> chat messages as chat templates take them.

reasoning, message and function_call items up to the next turn of somebody else are one assistant message: `content`
(a string, perhaps empty), `reasoning_content`, `tool_calls` with arguments as an object, which is what transformers'
templates expect. A function_call_output is a message of the role `tool`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from megadpo.rollouts.reasons import Unusable

ChatMessage: TypeAlias = dict[str, Any]

_TEXT_PARTS = {"output_text": "text", "input_text": "text", "text": "text", "refusal": "refusal"}
_REASONING_PARTS = {"summary_text": "text", "reasoning_text": "text", "text": "text"}


@dataclass
class Conversation:
    """Messages in order, and what was seen on the way that a user may want to know."""

    messages: list[ChatMessage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def to_messages(items: Sequence[object], name: str, *, keep_reasoning: bool = True) -> Conversation:
    """The items as messages. `name` is what errors call the list. Raises Unusable for what chat messages can't hold."""
    reader = _Reader(name, keep_reasoning)
    for number, item in enumerate(items):
        reader.add(item, f"{name}[{number}]")
    return reader.conversation


class _Reader:
    def __init__(self, name: str, keep_reasoning: bool) -> None:
        self.conversation = Conversation()
        self.keep_reasoning = keep_reasoning
        self._open: ChatMessage | None = None  # the assistant message that further items join
        self._function_names: dict[str, str] = {}

    def add(self, item: object, where: str) -> None:
        if not isinstance(item, Mapping):
            raise Unusable("unsupported_item", f"{where} of type {type(item).__name__}")
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            self._reasoning(item, where)
        elif kind == "function_call":
            call = _tool_call(item, item.get("call_id") or item.get("id"), where)
            self._assistant(new=False).setdefault("tool_calls", []).append(self._noted(call))
        elif kind == "function_call_output":
            self._tool_output(item.get("call_id"), item.get("output"), where)
        else:
            raise Unusable("unsupported_item", f"{where} of type {str(kind)[:60]!r}")

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role == "assistant":
            self._assistant_message(item, where)
            return
        if role == "tool":
            self._tool_output(item.get("tool_call_id"), item.get("content"), where)
            return
        if role not in ("system", "developer", "user"):
            raise Unusable("unsupported_item", f"{where} with the role {str(role)[:60]!r}")
        # OpenAI's newer name of the system role; most chat templates would leave the message out without a word
        self._close_with({"role": "system" if role == "developer" else role, "content": _text(item, "content", where)})

    def _assistant_message(self, item: Mapping[str, Any], where: str) -> None:
        content = _text(item, "content", where)
        message = self._assistant(new=bool(self._open and self._open["content"]))
        message["content"] = content
        reasoning = item.get("reasoning_content")
        if reasoning and self.keep_reasoning:
            message["reasoning_content"] = message.get("reasoning_content", "") + _string(reasoning, where)
        calls = item.get("tool_calls") or []
        if not isinstance(calls, list):
            raise Unusable("unsupported_item", f"{where}.tool_calls of type {type(calls).__name__}")
        for number, call in enumerate(calls):
            inner = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(inner, Mapping):
                raise Unusable("unsupported_item", f"{where}.tool_calls[{number}] without a function")
            made = _tool_call(inner, call.get("id"), f"{where}.tool_calls[{number}]")
            message.setdefault("tool_calls", []).append(self._noted(made))

    def _reasoning(self, item: Mapping[str, Any], where: str) -> None:
        parts = item.get("content") or item.get("summary") or []
        text = _joined(parts, _REASONING_PARTS, where, separator="\n")
        if not text:
            self.conversation.notes.append("reasoning items without text (encrypted, or not returned)")
        if text and self.keep_reasoning:
            message = self._assistant(new=bool(self._open and (self._open["content"] or "tool_calls" in self._open)))
            earlier = message.get("reasoning_content")
            message["reasoning_content"] = text if earlier is None else f"{earlier}\n{text}"

    def _tool_output(self, call_id: object, output: object, where: str) -> None:
        message: ChatMessage = {"role": "tool", "content": _joined(output, _TEXT_PARTS, where)}
        if call_id is not None:
            message["tool_call_id"] = _string(call_id, where)
            if message["tool_call_id"] in self._function_names:
                message["name"] = self._function_names[message["tool_call_id"]]
        self._close_with(message)

    def _assistant(self, *, new: bool) -> ChatMessage:
        """The assistant message to write to; a new one if none is open or `new`."""
        if self._open is None or new:
            self._open = {"role": "assistant", "content": ""}
            self.conversation.messages.append(self._open)
        return self._open

    def _close_with(self, message: ChatMessage) -> None:
        self._open = None
        self.conversation.messages.append(message)

    def _noted(self, call: ChatMessage) -> ChatMessage:
        if "id" in call:
            self._function_names[call["id"]] = call["function"]["name"]
        return call


def to_tools(tools: object) -> list[dict[str, Any]]:
    """Tools of a request as chat templates take them: {type: function, function: {name, description, parameters}}.
    Raises Unusable for tools that are no functions."""
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise Unusable("unsupported_item", f"tools of type {type(tools).__name__}")
    made = []
    for number, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function" or "name" not in function:
            kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
            raise Unusable("unsupported_item", f"tools[{number}] of type {str(kind)[:60]!r}")
        kept = {key: function[key] for key in ("name", "description", "parameters") if function.get(key) is not None}
        made.append({"type": "function", "function": kept})
    return made


def _tool_call(function: Mapping[str, Any], call_id: object, where: str) -> ChatMessage:
    given = arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise Unusable("broken_arguments", f"{where} with the arguments {given!r:.100}")
    call: ChatMessage = {} if call_id is None else {"id": _string(call_id, where)}
    name = _string(function.get("name"), f"{where}.name")
    return call | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    return _joined(item.get(key), _TEXT_PARTS, f"{where}.{key}")


def _joined(value: object, kinds: Mapping[str, str], where: str, separator: str = "") -> str:
    """A string, nothing, or a list of parts of the given kinds {type: its text's key}, as one string."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise Unusable("unsupported_item", f"{where} of type {type(value).__name__}")
    texts = []
    for number, part in enumerate(value):
        kind = str(part.get("type") if isinstance(part, Mapping) else type(part).__name__)
        text = part.get(kinds[kind]) if isinstance(part, Mapping) and kind in kinds else None
        if not isinstance(text, str):
            raise Unusable("unsupported_item", f"{where}[{number}] of type {kind[:60]!r}")
        texts.append(text)
    return separator.join(texts)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise Unusable("unsupported_item", f"{where} of type {type(value).__name__}, not a string")
    return value
