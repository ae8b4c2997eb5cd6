"""Rows -> preference pairs. A format is one file of this folder; docs/data.md shows a row of each.

A format says what it is called, which keys of `data` it reads, whether a row looks like one of its own, how such a row
becomes a pair, and which data set of the hub it is known for. A further one joins by a file here, or by one that the
config names in `plugins`, which calls `register`. Nothing here needs numpy or torch: the config is checked with it.
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
class FieldKeys:
    """What a row calls its fields: `data.prompt_key`, `data.chosen_key`, `data.rejected_key`."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub that NeMo RL knows by the format's name alone."""

    path: str
    subset: str | None = None
    validation_split: str | None = None
    """The split that validates by default; None where it has none."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """One way to write a pair down."""

    name: str
    """`data.dataset_name`: NeMo RL's where it has one."""
    read: Callable[[Row, FieldKeys, Place], PreferencePair | list[Problem]]
    """The pair, or every problem of the row."""
    fields: Callable[[FieldKeys], tuple[str, ...]]
    """Fields that a row of this format has: it is recognised by them. (): never recognised, only named."""
    keys: tuple[str, ...] = ()
    """Keys of `data` that rename its fields."""
    hub: HubDataset | None = None
    """Where its own data set is."""
    is_last: bool = False
    """Rows of other formats have its fields, too: it is tried after those."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Keys that name fields, where the format named in the config doesn't read them."""
        for field in dataclasses.fields(FieldKeys):
            key, default = f"{field.name}_key", field.default
            value = getattr(known.cfg.data, key)
            if value != default and key not in self.keys:
                fix = "remove it, or set data.dataset_name: BinaryPreferenceDataset"
                yield Problem(f"data.{key}", value, f"{default}, since {self.name} has field names of its own", fix)


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
