"""Rows -> preference pairs. A format is one file of this folder; docs/data.md shows a row of each.

A format is a frozen dataclass whose fields are its options, keys of `data`. It says whether a row looks like one of its
own, how such a row becomes a pair, and which data set of the hub it is known for. A further one is a file here, or one
that the config names in `plugins`, with `@FORMATS.add(name)`: `data.dataset_name`, NeMo RL's name where it has one.
Nothing here needs numpy or torch: the config is checked with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.sources import Place

Row: TypeAlias = Mapping[str, Any]

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `role` and `content` are strings; further keys (`reasoning_content`, `tool_calls`, `name`, ...)
reach the chat template as they are, except that arguments of tool calls are objects even where the file has JSON text."""

Text: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, before tokenisation. Each is a text or a tuple of messages.

    An answer of several messages ends in the assistant's; the others may be the user's, a tool's or the assistant's.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    place: Place
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools that the chat template is told of."""
    is_transcript: bool = False
    """The three texts are parts of Human/Assistant transcripts (transcript.py). With a chat template their turns become
    messages."""


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub that NeMo RL knows by the format's name alone."""

    path: str
    subset: str | None = None
    validation_split: str | None = None
    """The split that validates by default; None where it has none."""


class RowFormat:
    """Base of the formats: one way to write a pair down."""

    hub: ClassVar[HubDataset | None] = None
    """Where its own data set is."""
    is_last: ClassVar[bool] = False
    """Rows of other formats have its fields, too: it is tried after those."""

    def fields(self) -> tuple[str, ...]:
        """Fields that a row of this format has: it is recognised by them. (): never recognised, only named."""
        raise NotImplementedError

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        """The pair, or every problem of the row."""
        raise NotImplementedError


def formats_with(options: Mapping[str, Any]) -> dict[str, RowFormat]:
    """Every format by its name, with those of `options` that are its own, in the order in which a row is held to them."""
    formats: dict[str, RowFormat] = {name: FORMATS.configured(name, options) for name in FORMATS.names()}
    return dict(sorted(formats.items(), key=lambda item: item[1].is_last))


def find_format(row: Row, formats: Mapping[str, RowFormat]) -> str | None:
    """The name of the first format whose fields the row has."""
    for name, row_format in formats.items():
        fields = row_format.fields()
        if fields and all(field in row for field in fields):
            return name
    return None
