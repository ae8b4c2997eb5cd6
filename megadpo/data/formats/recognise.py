"""How a row becomes a PreferencePair: the one place that knows row formats.

A format is a `RowFormat` in `FORMATS`. A further one joins by `register`, with a `matches` that tells its rows from
the others' and a `read` that either makes a pair or says everything that is wrong with the row. docs/data.md shows a
row of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megadpo.config.problems import Problem
from megadpo.data.formats.messages import Place, Text, read_text, read_tools, roles_of, some_keys
from megadpo.data.formats.transcript import ASSISTANT, turns_of
from megadpo.data.pairs import Message, PreferencePair
from megadpo.files.jsonl import type_name

__all__ = ["FORMATS", "FieldKeys", "Place", "RowFormat", "find_format", "recognise", "register"]

Row = Mapping[str, Any]
Messages = tuple[Message, ...]

_MEDIA_FIELDS = ("image", "images", "video", "videos", "audio")


@dataclass(frozen=True)
class FieldKeys:
    """What a row calls its fields: `data.prompt_key`, `data.chosen_key`, `data.rejected_key`."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True)
class RowFormat:
    """One way to write a pair down."""

    name: str
    """`data.dataset_name`: NeMo RL's where it has one."""
    matches: Callable[[Row, FieldKeys], bool]
    """Whether the row looks like this format; cheap, and sure about no more than the field names."""
    read: Callable[[Row, FieldKeys, Place], PreferencePair | list[Problem]]
    """The pair, or every problem of the row."""


FORMATS: dict[str, RowFormat] = {}
"""In order of registration, which is the order of recognition."""


def register(row_format: RowFormat) -> RowFormat:
    """Adds a format. Raises ValueError if its name is taken."""
    if row_format.name in FORMATS:
        raise ValueError(f"format {row_format.name!r} is registered already")
    FORMATS[row_format.name] = row_format
    return row_format


def find_format(row: Row, keys: FieldKeys) -> RowFormat | None:
    """The first format that the row matches."""
    return next((row_format for row_format in FORMATS.values() if row_format.matches(row, keys)), None)


def recognise(row: Row, keys: FieldKeys) -> RowFormat:
    """The first format that the row matches; the prompt, chosen, rejected one if none, whose `read` names what the
    row lacks."""
    return find_format(row, keys) or PROMPT_CHOSEN_REJECTED


# What the formats have in common


def _fields(
    row: Row, wanted: list[tuple[str, str | None]], place: Place, *, prompt: str | None = None
) -> dict[str, Text] | list[Problem]:
    """The fields as texts by their keys. `wanted`: key, and the config key that renames it, if one does."""
    problems: list[Problem] = []
    texts: dict[str, Text] = {}
    for key, config_key in wanted:
        if key not in row:
            problems.append(_missing(row, key, [name for name, _ in wanted], config_key, place))
            continue
        text, found = read_text(row[key], key, place, is_prompt=key == prompt)
        problems.extend(found)
        if text is not None:
            texts[key] = text
    return problems or texts


def _missing(row: Row, key: str, wanted: list[str], config_key: str | None, place: Place) -> Problem:
    names = ", ".join(repr(name) for name in wanted[:-1]) + f" and {wanted[-1]!r}"
    renamed = f", or say in data.{config_key} what the file calls it" if config_key else ""
    fix = f"add the field{renamed}, or name the rows' format in data.dataset_name (docs/data.md lists them)"
    if "responses_create_params" in row:
        fix = "make pairs of these rollouts: python tools/build_pairs.py ROLLOUTS.jsonl -o PAIRS.jsonl"
    return Problem(
        where=str(place),
        value=f"no field {key!r}, only {some_keys(row)}",
        expected=f"an object with the fields {names}",
        fix=fix,
    )


def _pair(
    row: Row, place: Place, prompt: Text, chosen: Text, rejected: Text, *, is_transcript: bool = False
) -> PreferencePair | list[Problem]:
    """The pair, unless its answers prefer nothing or the row holds what no text model reads."""
    if chosen == rejected:
        fix = "remove the row: a pair of equal answers prefers nothing"
        return [Problem(str(place), "two equal answers ('chosen' equal to 'rejected')", "two different answers", fix)]
    media = next((name for name in _MEDIA_FIELDS if row.get(name)), None)
    if media is not None:
        return [Problem(str(place), f"field {media!r}", "text only", "remove the row, or the field if it is idle")]
    tools = read_tools(row.get("tools"), place)
    if isinstance(tools, Problem):
        return [tools]
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        row=place.row,
        line=place.line,
        path=place.path,
        tools=tools,
        is_transcript=is_transcript,
    )


def _with_prompt(row: Row, place: Place, prompt: Text, chosen: Text, rejected: Text) -> PreferencePair | list[Problem]:
    """A pair with a prompt of its own; answers written as full conversations are shortened to what follows it."""
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        if isinstance(prompt, tuple):
            start = len(prompt)
            if chosen[:start] == prompt and rejected[:start] == prompt:
                chosen, rejected = chosen[start:], rejected[start:]
        elif chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
            return _full_conversations(row, place, chosen, rejected, prompt)
    problems = [_prompt_problem(prompt, place)] if isinstance(prompt, tuple) else []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, tuple) and (not answer or answer[0]["role"] != "assistant"):
            got = f"the {name} answer with the roles {roles_of(answer)[:6]}"
            expected = "the assistant's messages that answer the prompt, or the whole conversation, prompt included"
            fix = "remove the turns before the answer, or make both answers begin with the prompt's messages"
            problems.append(Problem(str(place), got, expected, fix))
    found = [problem for problem in problems if problem is not None]
    if found:
        return found
    if isinstance(prompt, tuple) and isinstance(chosen, tuple) and isinstance(rejected, tuple):
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = prompt + chosen[:shared], chosen[shared:], rejected[shared:]
    return _pair(row, place, prompt, chosen, rejected)


def _prompt_problem(prompt: Messages, place: Place) -> Problem | None:
    if prompt[-1]["role"] != "assistant":
        return None
    return Problem(
        where=str(place),
        value="a prompt that ends in an assistant message",
        expected="a prompt that waits for the assistant",
        fix="move that message into the answers",
    )


def _shared(chosen: tuple[Any, ...], rejected: tuple[Any, ...]) -> int:
    """How many leading turns both have; at least one turn is left to each."""
    most = min(len(chosen), len(rejected)) - 1
    return next((number for number in range(most) if chosen[number] != rejected[number]), most)


def _full_conversations(
    row: Row, place: Place, chosen: Messages, rejected: Messages, prompt: str | None = None
) -> PreferencePair | list[Problem]:
    """A pair of conversations whose common turns are the prompt. `prompt`: a copy of one of those turns, to check."""
    shared = _shared(chosen, rejected)
    context = chosen[:shared]
    if chosen == rejected:
        return _pair(row, place, context, chosen, rejected)
    asked = [str(message["content"]).strip() for message in context if message["role"] != "assistant"]
    if "user" not in roles_of(context):
        return [_not_shared(place)]
    if prompt is not None and prompt.strip() not in asked:
        got = "a prompt that is none of the turns which both answers begin with"
        expected = "the same prompt in all three fields"
        fix = "mend the row, or set data.dataset_name: Tulu3Preference, which takes the prompt from the answers alone"
        return [Problem(str(place), got, expected, fix)]
    return _pair(row, place, context, chosen[shared:], rejected[shared:])


def _not_shared(place: Place) -> Problem:
    return Problem(
        where=str(place),
        value="two conversations that begin differently",
        expected="two answers to one prompt: at least the first user turn in common",
        fix="remove the row, or mend what differs in its first turns",
    )


# BinaryPreferenceDataset and DPODataset


def _read_binary(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    names = {keys.prompt: "prompt_key", keys.chosen: "chosen_key", keys.rejected: "rejected_key"}
    texts = _fields(row, list(names.items()), place, prompt=keys.prompt)
    if isinstance(texts, list):
        return texts
    return _with_prompt(row, place, texts[keys.prompt], texts[keys.chosen], texts[keys.rejected])


def _read_dpo(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    names = ("prompt", "chosen_response", "rejected_response")
    texts = _fields(row, [(name, None) for name in names], place, prompt="prompt")
    return texts if isinstance(texts, list) else _with_prompt(row, place, *(texts[name] for name in names))


# PreferenceDataset


def _read_ranked(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    """`context` and two `completions`, each with a `rank`; the lower rank is preferred."""
    wanted = ["context", "completions"]
    missing = [_missing(row, key, wanted, None, place) for key in wanted if key not in row]
    if missing:
        return missing
    context, problems = read_text(row["context"], "context", place, is_prompt=True)
    completions = row["completions"]
    if not isinstance(completions, list) or len(completions) != 2:
        got = f"{len(completions)} completions" if isinstance(completions, list) else type_name(completions)
        fix = "keep the best and the worst, or write a row for each two"
        return [*problems, Problem(str(place), f"completions: {got}", "a list of exactly two completions", fix)]
    ranked: list[tuple[int, Text]] = []
    for number, completion in enumerate(completions):
        name = f"completions[{number}]"
        rank = completion.get("rank") if isinstance(completion, dict) else None
        if not isinstance(completion, dict) or type(rank) is not int or "completion" not in completion:
            expected = "an object {rank: whole number, completion: messages}"
            got = f"{name} of type {type_name(completion)}"
            if isinstance(completion, dict):
                got = f"{name} with rank {rank!r} and the fields {some_keys(completion)}"
            problems.append(Problem(str(place), got, expected, "write each completion so; lower ranks are preferred"))
            continue
        answer, found = read_text(completion["completion"], f"{name}.completion", place, is_prompt=False)
        problems += found
        if answer is not None:
            ranked.append((rank, answer))
    if problems or context is None:
        return problems
    if ranked[0][0] == ranked[1][0]:
        fix = "remove the row: completions that rank equal prefer nothing"
        return [Problem(str(place), f"two completions of rank {ranked[0][0]}", "two different ranks", fix)]
    (_, chosen), (_, rejected) = sorted(ranked, key=lambda one: one[0])
    return _with_prompt(row, place, context, chosen, rejected)


# HelpSteer3

_HELPSTEER = ["context", "response1", "response2", "overall_preference"]


def _read_helpsteer(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    """`overall_preference` below 0 prefers response1, above 0 response2."""
    texts = _fields(row, [(name, None) for name in _HELPSTEER[:3]], place, prompt="context")
    preference = row.get("overall_preference")
    where, field = str(place), "overall_preference"
    if isinstance(preference, bool) or not isinstance(preference, int | float) or preference != preference:
        got = f"field {field!r} with {preference!r}" if field in row else f"no field {field!r}"
        problem = Problem(where, got, "a number, below 0 for response1 and above 0 for response2", "give the row one")
        return [*texts, problem] if isinstance(texts, list) else [problem]
    if isinstance(texts, list):
        return texts
    if preference == 0:
        return [Problem(where, f"{field} 0", "a preference for one of the two", "remove the row: it prefers nothing")]
    better, worse = ("response1", "response2") if preference < 0 else ("response2", "response1")
    return _with_prompt(row, place, texts["context"], texts[better], texts[worse])


# Tulu3Preference and ImplicitPrompt: the prompt is what both answers begin with


def _read_tulu(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    """Two full conversations; further fields (`prompt` among them) say nothing that these do not."""
    texts = _fields(row, [(keys.chosen, "chosen_key"), (keys.rejected, "rejected_key")], place)
    if isinstance(texts, list):
        return texts
    chosen, rejected = texts[keys.chosen], texts[keys.rejected]
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        return _full_conversations(row, place, chosen, rejected)
    fix = "write both answers as lists of messages, or leave data.dataset_name out"
    return [Problem(str(place), "answers as strings", "two lists of messages, prompt included", fix)]


def _read_implicit(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    """Two full conversations, or two transcripts of Human and Assistant turns."""
    texts = _fields(row, [(keys.chosen, "chosen_key"), (keys.rejected, "rejected_key")], place)
    if isinstance(texts, list):
        return texts
    chosen, rejected = texts[keys.chosen], texts[keys.rejected]
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        return _full_conversations(row, place, chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _transcripts(row, place, chosen, rejected)
    fix = "write both answers in the same form"
    return [Problem(str(place), "one answer as a string, the other as messages", "two of the same form", fix)]


def _transcripts(row: Row, place: Place, chosen: str, rejected: str) -> PreferencePair | list[Problem]:
    chosen_turns, rejected_turns = turns_of(chosen), turns_of(rejected)
    problems = []
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if not turns:
            got = f"no field 'prompt', and a {name} text that does not begin with a turn such as 'Human:'"
            expected = "a prompt, or two transcripts of turns that begin with a blank line and 'Human:' or 'Assistant:'"
            fix = "add the prompt's field (data.prompt_key says its name), or write the transcript's turns so"
            problems.append(Problem(str(place), got, expected, fix))
        elif turns[-1].role != "assistant" or not turns[-1].said.strip():
            got = f"a {name} transcript " + (
                "without an answer at its end" if turns[-1].said.strip() else "empty at its end"
            )
            expected = "one that ends in what the assistant said"
            problems.append(Problem(str(place), got, expected, "remove what follows the answer, or remove the row"))
    if problems:
        return problems
    shared = _shared(tuple(chosen_turns), tuple(rejected_turns))
    if chosen != rejected and "user" not in [turn.role for turn in chosen_turns[:shared]]:
        return [_not_shared(place)]
    prompt = "".join(turn.text for turn in chosen_turns[:shared])
    if chosen[len(prompt) :].startswith(ASSISTANT) and rejected[len(prompt) :].startswith(ASSISTANT):
        prompt += ASSISTANT
    start = len(prompt)
    return _pair(row, place, prompt, chosen[start:], rejected[start:], is_transcript=True)


def _has(*fields: str) -> Callable[[Row, FieldKeys], bool]:
    return lambda row, keys: all(field in row for field in fields)


PROMPT_CHOSEN_REJECTED = register(
    RowFormat(
        "BinaryPreferenceDataset",
        lambda row, keys: all(key in row for key in (keys.prompt, keys.chosen, keys.rejected)),
        _read_binary,
    )
)
register(RowFormat("PreferenceDataset", _has("context", "completions"), _read_ranked))
register(RowFormat("DPODataset", _has("prompt", "chosen_response", "rejected_response"), _read_dpo))
register(RowFormat("HelpSteer3", _has(*_HELPSTEER), _read_helpsteer))
register(RowFormat("Tulu3Preference", lambda row, keys: False, _read_tulu))  # recognised as one of its neighbours
register(
    RowFormat(
        "ImplicitPrompt",
        lambda row, keys: keys.chosen in row and keys.rejected in row,
        _read_implicit,
    )
)
