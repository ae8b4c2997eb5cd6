"""Transcripts as in Anthropic's hh-rlhf: turns that begin with a blank line and `Human:` or `Assistant:`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megadpo.data.formats import Message

ASSISTANT = "\n\nAssistant:"

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Turn:
    """One turn: its opening and its text."""

    role: str
    opening: str
    """For example a blank line and `Assistant:`. Empty if the opening is at the end of the prompt."""
    words: str

    @property
    def text(self) -> str:
        return self.opening + self.words


def turns_of(text: str, *, inside_assistant: bool = False) -> list[Turn]:
    """The turns of a transcript, in order; their texts, joined, are the transcript. Empty if it doesn't begin with a turn.

    `inside_assistant`: the text begins inside the assistant's turn, because the prompt ends in `Assistant:`."""
    marks = [mark for mark in _TURN.finditer(text) if not inside_assistant or mark[0].startswith("\n\n")]
    turns = []
    if inside_assistant:
        turns.append(Turn("assistant", "", text[: marks[0].start()] if marks else text))
    elif not marks or marks[0].start() > 0:
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)] if marks else []
    for mark, end in zip(marks, ends, strict=True):
        turns.append(Turn(_ROLES[mark[1]], mark[0], text[mark.end() : end]))
    return turns


def messages_of(text: str, *, inside_assistant: bool = False) -> list[Message]:
    """The transcript's turns as chat messages, without surrounding white space. An empty last turn is left out."""
    turns = turns_of(text, inside_assistant=inside_assistant)
    if turns and not turns[-1].words.strip() and turns[-1].role == "assistant":
        turns.pop()
    return [{"role": turn.role, "content": turn.words.strip()} for turn in turns]
