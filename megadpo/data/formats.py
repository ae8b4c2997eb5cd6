"""How a row of a file becomes a PreferencePair: the one place that knows row formats.

A format is a `RowFormat` in `FORMATS`. A further one joins by `register`, with a `matches` that tells its rows from
the others' and a `read` that either makes a pair or says everything that is wrong with the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from megadpo.config.problems import Problem
from megadpo.data.pairs import Message, PreferencePair

Text: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True)
class FieldKeys:
    """What a row calls its fields: `data.prompt_key`, `data.chosen_key`, `data.rejected_key`."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    path: str
    line: int
    row: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class RowFormat:
    """One way to write a pair down."""

    name: str
    """NeMo RL's dataset name where it has one: `data.dataset_name`."""
    matches: Callable[[Mapping[str, Any], FieldKeys], bool]
    """Whether the row looks like this format; cheap, and sure about no more than the field names."""
    read: Callable[[Mapping[str, Any], FieldKeys, Place], PreferencePair | list[Problem]]
    """The pair, or every problem of the row."""


FORMATS: dict[str, RowFormat] = {}
"""In order of registration, which is the order of recognition."""


def register(row_format: RowFormat) -> RowFormat:
    """Adds a format. Raises ValueError if its name is taken."""
    if row_format.name in FORMATS:
        raise ValueError(f"format {row_format.name!r} is registered already")
    FORMATS[row_format.name] = row_format
    return row_format


def recognise(row: Mapping[str, Any], keys: FieldKeys) -> RowFormat:
    """The first format that the row matches; the prompt, chosen, rejected one if none, whose `read` names what the
    row lacks."""
    for row_format in FORMATS.values():
        if row_format.matches(row, keys):
            return row_format
    return PROMPT_CHOSEN_REJECTED


def _matches(row: Mapping[str, Any], keys: FieldKeys) -> bool:
    return all(key in row for key in (keys.prompt, keys.chosen, keys.rejected))


def _read(row: Mapping[str, Any], keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    problems: list[Problem] = []
    texts: dict[str, Text] = {}
    for name, key in (("prompt", keys.prompt), ("chosen", keys.chosen), ("rejected", keys.rejected)):
        if key not in row:
            problems.append(
                Problem(
                    where=str(place),
                    value=f"no field {key!r}, only {_some_keys(row)}",
                    expected=f"an object with the fields {keys.prompt!r}, {keys.chosen!r} and {keys.rejected!r}",
                    fix=f"add the field, or say in data.{name}_key what the file calls it",
                )
            )
            continue
        text, found = _text(row[key], key, place, is_prompt=name == "prompt")
        problems.extend(found)
        if text is not None:
            texts[name] = text
    if problems:
        return problems
    if texts["chosen"] == texts["rejected"]:
        return [
            Problem(
                where=str(place),
                value=f"{keys.chosen!r} equal to {keys.rejected!r}",
                expected="two different answers",
                fix="remove the row: a pair of equal answers prefers nothing",
            )
        ]
    return PreferencePair(**texts, row=place.row, line=place.line, path=place.path)


PROMPT_CHOSEN_REJECTED = register(RowFormat("BinaryPreferenceDataset", _matches, _read))
"""Rows of `{prompt, chosen, rejected}`, each a string or a list of messages."""


def _some_keys(row: Mapping[str, Any]) -> str:
    names = [repr(str(key)[:30]) for key in list(row)[:6]]
    return ", ".join(names) + (", ..." if len(row) > 6 else "") if names else "an empty object"


def _text(value: object, key: str, place: Place, *, is_prompt: bool) -> tuple[Text | None, list[Problem]]:
    """The field as a string or a tuple of messages; or None and what is wrong with it."""
    if isinstance(value, str):
        problem = _string_problem(value, f"field {key!r}", place, may_be_empty=is_prompt)
        return (None, [problem]) if problem else (value, [])
    if not isinstance(value, list):
        return None, [
            Problem(
                where=str(place),
                value=f"field {key!r} of type {_type_name(value)}",
                expected="a string, or a list of messages {role, content}",
                fix="write the field as one of the two",
            )
        ]
    problems = [
        found
        for number, message in enumerate(value)
        if (found := _message_problem(message, f"message {number} of field {key!r}", place, is_prompt=is_prompt))
    ]
    if not problems:
        problems = _conversation_problems(value, key, place, is_prompt=is_prompt)
    return (None, problems) if problems else (tuple(value), [])


def _message_problem(message: object, name: str, place: Place, *, is_prompt: bool) -> Problem | None:
    if not isinstance(message, dict):
        return Problem(
            where=str(place),
            value=f"{name} of type {_type_name(message)}",
            expected="an object {role, content}",
            fix="write each message as an object with a role and a content",
        )
    for field in ("role", "content"):
        if not isinstance(message.get(field), str):
            return Problem(
                where=str(place),
                value=f"{name} with {field} of type {_type_name(message[field])}"
                if field in message
                else f"{name} without {field}",
                expected=f"a string as its {field}",
                fix=f"give the message a {field}",
            )
    return _string_problem(message["content"], f"content of {name}", place, may_be_empty=is_prompt)


def _conversation_problems(messages: list[Message], key: str, place: Place, *, is_prompt: bool) -> list[Problem]:
    """What the list as a whole must be: a prompt that waits for an answer, an answer of one assistant turn."""
    roles = [str(message["role"]) for message in messages]
    if is_prompt and not roles:
        return [
            Problem(
                where=str(place),
                value=f"field {key!r} without messages",
                expected="at least one message",
                fix="give the prompt a user message",
            )
        ]
    if is_prompt and roles[-1] == "assistant":
        return [
            Problem(
                where=str(place),
                value=f"field {key!r} that ends in an assistant message",
                expected="a prompt that waits for the assistant",
                fix="move that message into the answers",
            )
        ]
    if not is_prompt and roles != ["assistant"]:
        return [
            Problem(
                where=str(place),
                value=f"field {key!r} with the roles {roles[:6]}",
                expected="exactly one message, of the assistant",
                fix="move the turns before it, which both answers share, into the prompt",
            )
        ]
    return []


def _string_problem(text: str, name: str, place: Place, *, may_be_empty: bool) -> Problem | None:
    if not may_be_empty and not text.strip():
        return Problem(
            where=str(place),
            value=f"{name} empty" if not text else f"{name} of white space only",
            expected="an answer with text in it",
            fix="give the pair an answer, or remove the row",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON's "\ud800" is half a character, which no tokenizer takes
        return Problem(
            where=str(place),
            value=f"{name} with the half character {text[error.start]!a} at {error.start}",
            expected="text that UTF-8 can hold",
            fix="remove it, or write both halves of the surrogate pair",
        )
    return None


def _type_name(value: object) -> str:
    return {type(None): "null", dict: "object", list: "list", bool: "boolean"}.get(type(value), type(value).__name__)
