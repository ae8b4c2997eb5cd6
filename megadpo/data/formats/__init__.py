"""Rows -> preference pairs. A format is one file of this folder; docs/data.md shows a row of each.

A format has a name, the keys of `data` that it reads, the fields by which it recognises a row, a function that makes a
pair of a row, and the hub data set that it is named after. A new format is a file here, or a file that the config names
in `plugins`; the file calls `register`. Nothing here imports numpy or torch, because the config check imports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.sources import Place

if TYPE_CHECKING:
    from megadpo.config.known import Known

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


@dataclass(frozen=True)
class FieldKeys:
    """The names of a row's fields: `data.prompt_key`, `data.chosen_key`, `data.rejected_key`."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True)
class HubDataset:
    """The hub data set that NeMo RL loads when only the format's name is given."""

    path: str
    subset: str | None = None
    validation_split: str | None = None
    """The split for validation by default; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """One way to write a pair down."""

    name: str
    """The value of `data.dataset_name`; NeMo RL's name if it has one."""
    read: Callable[[Row, FieldKeys, Place], PreferencePair | list[Problem]]
    """Makes the pair of a row, or lists every problem of the row."""
    fields: Callable[[FieldKeys], tuple[str, ...]]
    """Fields by which a row of this format is recognised. (): never recognised; the config must name the format."""
    keys: tuple[str, ...] = ()
    """Keys of `data` that rename its fields."""
    hub: HubDataset | None = None
    """Its own hub data set."""
    is_last: bool = False
    """Rows of other formats also have its fields, so it is tried last."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Config keys that rename fields, if this format does not read them."""
        for field in dataclasses.fields(FieldKeys):
            key, default = f"{field.name}_key", field.default
            value = getattr(known.cfg.data, key)
            if value != default and key not in self.keys:
                fix = "remove it, or set data.dataset_name: BinaryPreferenceDataset"
                yield Problem(f"data.{key}", value, f"{default}, since {self.name} has fixed field names", fix)


def register(row_format: RowFormat) -> RowFormat:
    """Adds a format. Raises ValueError if its name is taken."""
    FORMATS.add(row_format.name)(row_format)
    return row_format


def find_format(row: Row, keys: FieldKeys) -> RowFormat | None:
    """The first format whose fields the row has."""
    formats: list[RowFormat] = sorted(FORMATS, key=lambda one: one.is_last)
    for row_format in formats:
        fields = row_format.fields(keys)
        if fields and all(field in row for field in fields):
            return row_format
    return None
