"""Files, folders and data sets of the hub -> rows: what every source gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from megadpo.config.problems import Problem

MOST_PROBLEMS = 20
"""A source with more problems than this is not read to its end."""


@dataclass(frozen=True)
class Place:
    """Where a row stands."""

    path: str
    line: int
    """From 1; of a Parquet or Arrow file, a folder or a hub data set, the row from 1."""
    row: int
    """From 0, blank lines not counted."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


Rows: TypeAlias = "Iterator[tuple[Place, dict[str, object] | Problem]]"
"""Each row with its place, or what is wrong with it."""
