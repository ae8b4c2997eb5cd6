"""Reads fields and chat messages of all formats, checks them and makes them uniform.

A null key of a message counts as absent, because Parquet and Arrow write null for keys that a message lacks.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from megadpo.config.problems import Problem
from megadpo.data.formats import Message, Text
from megadpo.data.sources import Place
from megadpo.files.jsonl import type_name
from megadpo.messages.chat import MessageError, arguments_of, text_of


def read_text(value: object, key: str, place: Place, *, is_prompt: bool) -> tuple[Text | None, list[Problem]]:
    """The field as a string or a tuple of messages; or None and what is wrong. The formats check the order of roles."""
    if isinstance(value, str):
        problem = string_problem(value, f"field {key!r}", place, may_be_empty=is_prompt)
        problem = problem or _quoted_problem(value, key, place)
        return (None, [problem]) if problem else (value, [])
    if not isinstance(value, list):
        return None, [
            Problem(
                where=str(place),
                value=f"field {key!r} of type {type_name(value)}",
                expected="a string, or a list of messages {role, content}",
                fix="write the field as one of the two",
            )
        ]
    if not value:
        expected = "at least one message" + (" for the model to answer" if is_prompt else "")
        problem = Problem(str(place), f"field {key!r} without messages", expected, "give it one, or remove the row")
        return None, [problem]
    messages: list[Message] = []
    problems: list[Problem] = []
    for number, message in enumerate(value):
        read = _read_message(message, f"message {number} of field {key!r}", place)
        if isinstance(read, Problem):
            problems.append(read)
        else:
            messages.append(read)
    if not problems and not is_prompt:
        problem = _last_answer_problem(messages, key, place)
        problems = [problem] if problem else []
    return (None, problems) if problems else (tuple(messages), [])


def _quoted_problem(text: str, key: str, place: Place) -> Problem | None:
    """Refuses a list of messages that is written as JSON text: it would be trained on as plain text."""
    if not re.match(r"\s*\[\s*\{", text):
        return None
    try:
        read = json.loads(text)
    except ValueError:
        return None
    if not all(isinstance(one, dict) and "role" in one and "content" in one for one in read):
        return None
    expected = "the list itself, not its text (only cells of CSV files may hold JSON text)"
    return Problem(
        str(place), f"field {key!r}: messages as JSON text", expected, "decode the field: json.loads in Python"
    )


def roles_of(messages: tuple[Message, ...]) -> list[str]:
    """The roles, in order."""
    return [str(message["role"]) for message in messages]


def _read_message(message: object, name: str, place: Place) -> Message | Problem:
    """The message without nulls, with its content as one string and the arguments of its tool calls as objects."""
    if not isinstance(message, dict):
        return Problem(
            where=str(place),
            value=f"{name} of type {type_name(message)}",
            expected="an object {role, content}",
            fix="write each message as an object with a role and a content",
        )
    read = {key: value for key, value in message.items() if value is not None}
    calls_tools = bool(read.get("tool_calls"))
    if read.get("content") is None and calls_tools:
        read["content"] = ""  # as OpenAI-compatible servers do before the template
    if isinstance(read.get("content"), list):
        try:
            read["content"] = text_of(read["content"], "content")
        except MessageError:
            return Problem(
                where=str(place),
                value=f"{name} with content parts other than text",
                expected='text, as a string or as parts {"type": "text", "text": ...}',
                fix="remove the row: only text can be trained on",
            )
    for field in ("role", "content"):
        if not isinstance(read.get(field), str):
            return Problem(
                where=str(place),
                value=f"{name} with {field} of type {type_name(message[field])}"
                if field in message
                else f"{name} without {field}",
                expected=f"a string as its {field}",
                fix=f"give the message a {field}"
                + ("; megadpo pairs makes messages of Responses items" if "type" in message else ""),
            )
    if not read["role"].strip():
        return Problem(str(place), f"{name} with an empty role", "who speaks: system, user, assistant, tool", "name it")
    reasoning = read.get("reasoning_content", "")
    if not isinstance(reasoning, str):
        got = f"{name} with reasoning_content of type {type_name(reasoning)}"
        return Problem(str(place), got, "a string", "write the reasoning as one text")
    if "tool_calls" in read:
        calls = _read_tool_calls(read["tool_calls"], name, place)
        if isinstance(calls, Problem):
            return calls
        del read["tool_calls"]
        if calls:
            read["tool_calls"] = calls
    for field in ("role", "content", "reasoning_content"):
        problem = string_problem(read.get(field, ""), f"{field} of {name}", place, may_be_empty=True)
        if problem is not None:
            return problem
    return read


def _read_tool_calls(calls: object, name: str, place: Place) -> list[dict[str, Any]] | Problem:
    """OpenAI's or Hugging Face's tool calls, with arguments as objects. (Servers such as vLLM do the same.)"""
    problem = Problem(
        where=str(place),
        value=f"tool_calls of {name}: {calls!r}",
        expected='a list of {"type": "function", "function": {"name": ..., "arguments": {...}}}',
        fix="write each call in this form; arguments are an object, or JSON text of an object",
    )
    if not isinstance(calls, list):
        return problem
    read = []
    for call in calls:
        if not isinstance(call, dict):
            return problem
        call = {key: value for key, value in call.items() if value is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return problem
        arguments = function.get("arguments")
        try:
            function = {**function, "arguments": {} if arguments is None else arguments_of(arguments, name)}
        except MessageError:
            return problem
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _last_answer_problem(messages: list[Message], key: str, place: Place) -> Problem | None:
    """Refuses an answer whose last message is not the assistant's, or has neither text nor tool calls."""
    last = messages[-1]
    if last["role"] != "assistant":
        return Problem(
            where=str(place),
            value=f"field {key!r} with the roles {[message['role'] for message in messages][-6:]}",
            expected="messages that end with the assistant's",
            fix="remove what follows the assistant's last message, or remove the row",
        )
    if last.get("tool_calls") or str(last.get("reasoning_content", "")).strip():
        return None
    name = f"content of message {len(messages) - 1} of field {key!r}"
    return string_problem(last["content"], name, place, may_be_empty=False)


def read_tools(value: object, place: Place) -> tuple[Mapping[str, Any], ...] | Problem | None:
    """A row's `tools` for the chat template: a list of objects, or JSON text of such a list."""
    if isinstance(value, str) and value.strip():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is None or value == [] or value == "":
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        expected = "a list with one object for each tool, or JSON text of it"
        fix = "write the tools in the form that the chat template reads, or leave the field out"
        return Problem(str(place), f"field 'tools' of type {type_name(value)}", expected, fix)
    return tuple(value)


def string_problem(text: str, name: str, place: Place, *, may_be_empty: bool) -> Problem | None:
    """Refuses a text that is not valid UTF-8, or is empty but must not be."""
    if not may_be_empty and not text.strip():
        return Problem(
            where=str(place),
            value=f"{name} empty" if not text else f"{name} of white space only",
            expected="an answer with text",
            fix="give the pair an answer, or remove the row",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's "\ud800" is half of a surrogate pair; no tokenizer reads it
        return Problem(
            where=str(place),
            value=f"{name} with half a surrogate pair, {text[error.start]!a}, at {error.start}",
            expected="text that UTF-8 can encode",
            fix="remove it, or write both halves of the surrogate pair",
        )
    return None
