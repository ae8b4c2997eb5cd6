"""Rows -> preference pairs. A format is one file of this folder; docs/data.md shows a row of each.

A format is a frozen dataclass whose fields are its options, keys of `data`. It has the fields by which it recognises a
row, a method that makes one or several pairs of a row, and the hub data set that it is named after. A new format is a file
here, or a file that the config names in `plugins`, with `@FORMATS.add(name)`: the value of `data.dataset_name`, NeMo RL's
name if it has one. Nothing here imports numpy or torch, because the config check imports it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.sources import Place

Row: TypeAlias = Mapping[str, Any]

Message: TypeAlias = Mapping[str, Any]
"""One chat message. `role` and `content` are strings. Other keys (`reasoning_content`, `tool_calls`, `name`, ...) are
passed to the chat template unchanged, but arguments of tool calls are always objects, even if the file has JSON text."""

Text: TypeAlias = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, before tokenisation. Each is a text or a tuple of messages.

    The last message of an answer is the assistant's. Those before it may be of a user, a tool or the assistant.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    place: Place
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools for the chat template."""
    is_transcript: bool = False
    """The three texts are parts of Human/Assistant transcripts (transcript.py). A chat template gets their turns as
    messages."""
    weight: float = 1.0
    """The pair's loss is multiplied by this."""
    rewards: tuple[float, float] = (math.nan, math.nan)
    """Rewards of the chosen and the rejected answer; NaN if the row has none."""


@dataclass(frozen=True)
class HubDataset:
    """The hub data set that NeMo RL loads when only the format's name is given."""

    path: str
    subset: str | None = None
    validation_split: str | None = None
    """The split for validation by default; None if there is none."""


class RowFormat:
    """Base of the formats: one way to write a pair down."""

    hub: ClassVar[HubDataset | None] = None
    """Its own hub data set."""
    is_last: ClassVar[bool] = False
    """Rows of other formats also have its fields, so it is tried last."""

    def fields(self) -> tuple[str, ...]:
        """Fields by which a row of this format is recognised. (): never recognised; the config must name the format."""
        raise NotImplementedError

    def read(self, row: Row, place: Place) -> PreferencePair | tuple[PreferencePair, ...] | list[Problem]:
        """Makes the pair of a row, or its pairs, at least one; or lists every problem of the row."""
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
