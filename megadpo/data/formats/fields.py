"""Functions for all formats: reading fields, splitting conversations into prompt and answers, and refusals."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.types import Text as Name
from megadpo.data.formats import Message, PreferencePair, Row, RowFormat, Text
from megadpo.data.formats.messages import read_text, read_tools, roles_of
from megadpo.data.sources import Place

Messages = tuple[Message, ...]

_REWARD_FIELDS = (("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected"))
"""The names in NeMo Aligner's and in UltraFeedback's pairs."""
_MEDIA_FIELDS = ("image", "images", "video", "videos", "audio")


def read_fields(
    row: Row, wanted: Mapping[str, str | None], place: Place, *, prompt: str | None = None
) -> dict[str, Text] | list[Problem]:
    """Field name -> text, or all problems of the fields. `wanted`: field name -> the config key that renames it, if any.
    `prompt`: the field that may be empty."""
    problems: list[Problem] = []
    texts: dict[str, Text] = {}
    for key, config_key in wanted.items():
        if key not in row:
            problems.append(missing_field(row, key, wanted, config_key, place))
            continue
        text, found = read_text(row[key], key, place, is_prompt=key == prompt)
        problems.extend(found)
        if text is not None:
            texts[key] = text
    return problems or texts


@dataclass(frozen=True, kw_only=True)
class AnswerKeys(RowFormat):
    """A format whose answers may have other names."""

    chosen_key: Name = "chosen"
    """What the rows call the chosen answer."""
    rejected_key: Name = "rejected"
    """And the rejected one."""

    def answers(self, row: Row, place: Place) -> tuple[Text | None, Text | None, list[Problem]]:
        """The chosen and the rejected field, which both include the prompt, and what is wrong with them."""
        texts = read_fields(row, {self.chosen_key: "chosen_key", self.rejected_key: "rejected_key"}, place)
        return (
            (None, None, texts) if isinstance(texts, list) else (texts[self.chosen_key], texts[self.rejected_key], [])
        )

    def problems(self, known: Known) -> Iterator[Problem]:
        if self.chosen_key == self.rejected_key:
            expected = "different from data.chosen_key"
            yield Problem("data.rejected_key", self.rejected_key, expected, "name chosen and rejected apart")


def missing_field(row: Row, key: str, wanted: Iterable[str], config_key: str | None, place: Place) -> Problem:
    """The problem of a row without the field `key`. `wanted`: all fields of the format."""
    *others, last = map(repr, wanted)
    renamed = f", or set data.{config_key} to its name in the file" if config_key else ""
    fix = f"add the field{renamed}, or name the rows' format in data.dataset_name (docs/data.md lists them)"
    if "responses_create_params" in row:
        fix = "make pairs of these rollouts: megadpo pairs ROLLOUTS.jsonl -o PAIRS.jsonl"
    return Problem(
        where=str(place),
        value=f"no field {key!r}, only {some_keys(row)}",
        expected=f"an object with the fields {', '.join(others)} and {last}",
        fix=fix,
    )


def some_keys(row: Mapping[str, Any]) -> str:
    """The first field names of a row, for messages."""
    names = [repr(str(key)[:30]) for key in list(row)[:6]]
    return ", ".join(names) + (", ..." if len(row) > 6 else "") if names else "an empty object"


def make_pair(
    row: Row, place: Place, prompt: Text, chosen: Text, rejected: Text, *, is_transcript: bool = False
) -> PreferencePair | list[Problem]:
    """The pair, or the problem: equal answers, images or other media, invalid tools, or an invalid weight."""
    if chosen == rejected:
        fix = "remove the row: two equal answers express no preference"
        return [Problem(str(place), "two equal answers ('chosen' equal to 'rejected')", "two different answers", fix)]
    media = next((name for name in _MEDIA_FIELDS if row.get(name)), None)
    if media is not None:
        return [Problem(str(place), f"field {media!r}", "text only", "remove the row, or the field if it isn't needed")]
    tools = read_tools(row.get("tools"), place)
    if isinstance(tools, Problem):
        return [tools]
    weight = 1.0 if row.get("weight") is None else _number(row["weight"])
    if not weight >= 0:
        fix = "correct it, remove the field, or give it another name where it means something else"
        return [Problem(str(place), f"weight {row['weight']!r}", "a number of 0 or more", fix)]
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        place=place,
        tools=tools,
        is_transcript=is_transcript,
        weight=weight,
        rewards=_rewards(row),
    )


def _rewards(row: Row) -> tuple[float, float]:
    """Of both answers, by the first names of _REWARD_FIELDS that the row has; NaN where it has none."""
    chosen, rejected = next((names for names in _REWARD_FIELDS if all(name in row for name in names)), ("", ""))
    return _number(row.get(chosen)), _number(row.get(rejected))


def _number(value: Any) -> float:
    """NaN where it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max / 2:
        return math.nan
    return float(value)


def pair_with_prompt(
    row: Row, place: Place, prompt: Text, chosen: Text, rejected: Text
) -> PreferencePair | list[Problem]:
    """A pair whose row has a prompt field. If the answers are full conversations, the prompt is removed from them."""
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        if isinstance(prompt, tuple):
            start = len(prompt)
            if chosen[:start] == prompt and rejected[:start] == prompt:
                chosen, rejected = chosen[start:], rejected[start:]
        elif chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
            return pair_of_conversations(row, place, chosen, rejected, prompt)
    problems = [_prompt_problem(prompt, place)] if isinstance(prompt, tuple) else []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, tuple) and (not answer or answer[0]["role"] != "assistant"):
            got = f"the {name} answer with the roles {roles_of(answer)[:6]}"
            expected = "the assistant's answer to the prompt, or the whole conversation with the prompt"
            fix = "remove the turns before the answer, or make both answers begin with the prompt's messages"
            problems.append(Problem(str(place), got, expected, fix))
    found = [problem for problem in problems if problem is not None]
    if found:
        return found
    if isinstance(prompt, tuple) and isinstance(chosen, tuple) and isinstance(rejected, tuple):
        shared = shared_turns(chosen, rejected)
        prompt, chosen, rejected = prompt + chosen[:shared], chosen[shared:], rejected[shared:]
    return make_pair(row, place, prompt, chosen, rejected)


def _prompt_problem(prompt: Messages, place: Place) -> Problem | None:
    if prompt[-1]["role"] != "assistant":
        return None
    return Problem(
        where=str(place),
        value="a prompt that ends in an assistant message",
        expected="a prompt that the assistant answers next",
        fix="move that message into the answers",
    )


def shared_turns(chosen: tuple[Any, ...], rejected: tuple[Any, ...]) -> int:
    """The number of equal turns at the start. At least one turn is left over on each side."""
    most = min(len(chosen), len(rejected)) - 1
    return next((number for number in range(most) if chosen[number] != rejected[number]), most)


def pair_of_conversations(
    row: Row, place: Place, chosen: Messages, rejected: Messages, prompt: str | None = None
) -> PreferencePair | list[Problem]:
    """A pair of two conversations. Their common first turns are the prompt. `prompt`: must be one of those turns."""
    shared = shared_turns(chosen, rejected)
    context = chosen[:shared]
    if chosen == rejected:
        return make_pair(row, place, context, chosen, rejected)
    asked = [str(message["content"]).strip() for message in context if message["role"] != "assistant"]
    if "user" not in roles_of(context):
        return [not_shared(place)]
    if prompt is not None and prompt.strip() not in asked:
        got = "a prompt that is not among the first turns that both answers share"
        expected = "the same prompt in all three fields"
        fix = "correct the row, or set data.dataset_name: Tulu3Preference, which does not read the prompt field"
        return [Problem(str(place), got, expected, fix)]
    return make_pair(row, place, context, chosen[shared:], rejected[shared:])


def not_shared(place: Place) -> Problem:
    return Problem(
        where=str(place),
        value="two conversations that begin differently",
        expected="two answers to one prompt: at least the first user turn in common",
        fix="remove the row, or correct its first turns",
    )
