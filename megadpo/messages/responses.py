"""Converts items of OpenAI's Responses API to chat messages, and back.

Consecutive items of the types reasoning, message and function_call are one message of the assistant. A
function_call_output is a message of the role `tool`. Chat messages among the items are read too.
Source of both forms: https://platform.openai.com/docs/guides/migrate-to-responses
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from megadpo.files.jsonl import type_name
from megadpo.messages.chat import TEXT_PARTS, ChatMessage, MessageError, part_text, string_of, text_of, tool_call

_ITEM_PARTS = TEXT_PARTS | {"refusal": "refusal"}
_REASONING_PARTS = {"summary_text": "text", "reasoning_text": "text", "text": "text"}


def to_messages(items: Sequence[object], name: str, *, keep_reasoning: bool = True) -> tuple[list[ChatMessage], int]:
    """The items as messages for a chat template, and the number of reasoning items without text. `name`: of the list, for
    errors. Raises MessageError for the first item that can't become a chat message."""
    reader = ItemReader(keep_reasoning=keep_reasoning)
    for number, item in enumerate(items):
        reader.add(item, f"{name}[{number}]")
    return reader.messages, reader.textless_reasoning


class ItemReader:
    """Reads items one by one; `messages` are the messages so far.

    for_template: messages for chat templates: arguments of calls are objects, `developer` (OpenAI's newer name of the
    system role, which most templates ignore) becomes `system`, and a tool's answer has the tool's name. Else for servers:
    arguments are text, roles are unchanged, and content may have images.
    """

    def __init__(self, *, keep_reasoning: bool = True, for_template: bool = True) -> None:
        self.messages: list[ChatMessage] = []
        self.textless_reasoning = 0
        """Reasoning items that are encrypted or were not returned."""
        self._keep_reasoning = keep_reasoning
        self._for_template = for_template
        self._open: ChatMessage | None = None  # the assistant message that further items join
        self._function_names: dict[str, str] = {}

    def add(self, item: object, where: str) -> None:
        """Raises MessageError for an item that can't become a chat message."""
        if not isinstance(item, Mapping):
            raise MessageError(where, item, f"of type {type_name(item)}")
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            self._add_message(item, where)
        elif kind == "reasoning":
            self._add_reasoning(item, where)
        elif kind == "function_call":
            self._add_call(item, item.get("call_id") or item.get("id"), where)
        elif kind == "function_call_output":
            self._add_tool_output(item.get("call_id"), item.get("output"), where)
        else:
            raise MessageError(where, item, f"of type {str(kind)[:60]!r}")

    def _add_message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role == "assistant":
            self._add_assistant_message(item, where)
        elif role == "tool":
            self._add_tool_output(item.get("tool_call_id"), item.get("content"), where)
        elif role in ("system", "developer", "user"):
            content = self._content(item, where)
            self._close_with({"role": "system" if role == "developer" and self._for_template else role} | content)
        else:
            raise MessageError(where, item, f"with the role {str(role)[:60]!r}")

    def _add_assistant_message(self, item: Mapping[str, Any], where: str) -> None:
        content = self._content(item, where)
        message = self._assistant(new=bool(self._open and self._open["content"]))
        message |= content
        reasoning = item.get("reasoning_content")
        if reasoning and self._keep_reasoning:
            message["reasoning_content"] = message.get("reasoning_content", "") + string_of(reasoning, where)
        calls = item.get("tool_calls") or []
        if not isinstance(calls, list):
            raise MessageError(f"{where}.tool_calls", calls, f"of type {type_name(calls)}")
        for number, call in enumerate(calls):
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping):
                raise MessageError(f"{where}.tool_calls[{number}]", call, "without a function")
            self._add_call(function, call.get("id"), f"{where}.tool_calls[{number}]")

    def _add_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        parts = item.get("content") or item.get("summary") or []
        text = text_of(parts, where, _REASONING_PARTS, separator="\n")
        self.textless_reasoning += not text
        if text and self._keep_reasoning:
            message = self._assistant(new=bool(self._open and (self._open["content"] or "tool_calls" in self._open)))
            earlier = message.get("reasoning_content")
            message["reasoning_content"] = text if earlier is None else f"{earlier}\n{text}"

    def _add_call(self, function: Mapping[str, Any], call_id: object, where: str) -> None:
        call = tool_call(function, call_id, where, for_template=self._for_template)
        if "id" in call:
            self._function_names[call["id"]] = call["function"]["name"]
        self._assistant(new=False).setdefault("tool_calls", []).append(call)

    def _add_tool_output(self, call_id: object, output: object, where: str) -> None:
        message: ChatMessage = {"role": "tool", "content": text_of(output, where, _ITEM_PARTS)}
        if call_id is not None:
            message["tool_call_id"] = string_of(call_id, where)
            if self._for_template and message["tool_call_id"] in self._function_names:
                message["name"] = self._function_names[message["tool_call_id"]]
        self._close_with(message)

    def _content(self, item: Mapping[str, Any], where: str) -> ChatMessage:
        content, where = item.get("content"), f"{where}.content"
        if not self._for_template and not isinstance(content, str) and not content and not item.get("tool_calls"):
            raise MessageError(where, content, "without text or parts")
        if self._for_template or not isinstance(content, list):
            return {"content": text_of(content, where, _ITEM_PARTS)}
        parts = [_server_part(part, f"{where}[{number}]") for number, part in enumerate(content)]
        is_text = all(part["type"] == "text" for part in parts)  # then one string: some templates accept no list
        return {"content": "".join(part["text"] for part in parts) if is_text else parts}

    def _assistant(self, *, new: bool) -> ChatMessage:
        """The assistant message that items are added to; a new one if none is open, or if `new`."""
        if self._open is None or new:
            self._open = {"role": "assistant", "content": ""}
            self.messages.append(self._open)
        return self._open

    def _close_with(self, message: ChatMessage) -> None:
        self._open = None
        self.messages.append(message)


def _server_part(part: object, where: str) -> dict[str, Any]:
    """A part of a content for servers: text or an image."""
    if isinstance(part, Mapping) and part.get("type") == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return {"type": "text", "text": part_text(part, where, _ITEM_PARTS)}


def to_items(message: Mapping[str, Any], status: str) -> list[dict[str, Any]]:
    """A server's chat message as items: its reasoning, its text (also if both text and calls are missing), its calls. Raises
    ValueError if the content is not text, or if a call is not of a function."""
    items: list[dict[str, Any]] = []
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning:
        summary = [{"text": str(reasoning), "type": "summary_text"}]
        items.append({"id": new_id("rs"), "summary": summary, "type": "reasoning", "encrypted_content": None})
    calls = message.get("tool_calls") or []
    content = message.get("content") or message.get("refusal") or ""
    if content or not calls:
        if not isinstance(content, str):
            raise ValueError("an answer whose content is not text")
        part: dict[str, Any] = {"annotations": [], "text": content, "type": "output_text", "logprobs": None}
        shared = {"role": "assistant", "status": status, "type": "message"}
        items.append({"id": new_id("msg"), "content": [part], **shared})
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise ValueError("an answer with a tool call that is not a function call")
        named = {"name": function.get("name"), "arguments": function.get("arguments"), "call_id": call.get("id")}
        items.append({**named, "type": "function_call", "id": new_id("fc"), "status": status})
    return items


def new_id(prefix: str) -> str:
    """A random id for an item or a response, in the form of OpenAI's servers."""
    return f"{prefix}_{uuid.uuid4().hex}"
