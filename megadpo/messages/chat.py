"""Chat messages: the text of their content, tool calls, and tools.

A chat message is {role, content, reasoning_content?, tool_calls?, tool_call_id?, name?}, as in OpenAI's chat completions
(https://platform.openai.com/docs/api-reference/chat) and in the chat templates of transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from megadpo.files.jsonl import type_name

ChatMessage: TypeAlias = dict[str, Any]

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
"""Content parts with text: type -> the key of the text."""

_MOST_CHARS = 60


class MessageError(ValueError):
    """A value that can't be part of a chat message. The text says where and what it is."""

    def __init__(
        self,
        where: str,
        value: object,
        found: str,
        reason: Literal["unsupported_item", "broken_arguments"] = "unsupported_item",
    ) -> None:
        super().__init__(f"{where} {found}")
        self.where = where
        """Such as `input[3].content[0]`."""
        self.value = value
        self.reason = reason


def text_of(content: object, where: str, parts: Mapping[str, str] = TEXT_PARTS, separator: str = "") -> str:
    """A message's content as one string. The content is a string, null, or a list of strings and text parts. Raises
    MessageError for other parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise MessageError(where, content, f"of type {type_name(content)}")
    return separator.join(part_text(part, f"{where}[{number}]", parts) for number, part in enumerate(content))


def part_text(part: object, where: str, parts: Mapping[str, str] = TEXT_PARTS) -> str:
    """The text of one part of a content. Raises MessageError for another kind of part."""
    kind = part.get("type") if isinstance(part, Mapping) else type_name(part)
    text = part.get(parts.get(str(kind))) if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise MessageError(where, part, f"of type {str(kind)[:_MOST_CHARS]!r}")
    return text


def arguments_of(arguments: object, where: str) -> dict[str, Any]:
    """The arguments of a tool call as an object. (transformers' templates expect an object; they would quote JSON text
    again.) Raises MessageError for a value that is neither an object nor JSON text of an object."""
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise MessageError(where, arguments, f"with the arguments {arguments!r:.100}", "broken_arguments")
    return value


def tool_call(function: Mapping[str, Any], call_id: object, where: str, *, for_template: bool = True) -> ChatMessage:
    """A call {name, arguments} as an entry of `tool_calls`. for_template: its arguments are an object; else text, for
    servers. Raises MessageError."""
    arguments = function.get("arguments")
    if for_template:
        arguments = arguments_of(arguments, where)
    elif not isinstance(arguments, str):
        arguments = json.dumps(arguments_of(arguments, where))
    call = {} if call_id is None else {"id": string_of(call_id, where)}
    name = string_of(function.get("name"), f"{where}.name")
    return call | {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(given: object, where: str, *, for_template: bool = True) -> dict[str, Any]:
    """A tool of either API as {type: function, function: {name, description, parameters}}; without for_template, for
    servers, also with `strict`. Raises MessageError for a tool that is no function."""
    function = given.get("function", given) if isinstance(given, Mapping) else None
    is_function = isinstance(given, Mapping) and given.get("type") == "function"
    if not is_function or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        kind = given.get("type") if isinstance(given, Mapping) else type_name(given)
        raise MessageError(where, given, f"of type {str(kind)[:_MOST_CHARS]!r}")
    keys = ("name", "description", "parameters") + (() if for_template else ("strict",))
    return {"type": "function", "function": {key: function[key] for key in keys if function.get(key) is not None}}


def string_of(value: object, where: str) -> str:
    """The value, if it is a string. Raises MessageError."""
    if not isinstance(value, str):
        raise MessageError(where, value, f"of type {type_name(value)}, not a string")
    return value
