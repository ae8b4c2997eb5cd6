"""Rows of files, folders and hub data sets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from megadpo.config.problems import Problem

MOST_PROBLEMS = 20
"""After this many problems, reading a source stops."""


@dataclass(frozen=True)
class Place:
    """Where a row is."""

    path: str
    line: int
    """From 1. For a Parquet or Arrow file, a folder or a hub data set: the row, from 1."""
    row: int
    """From 0, blank lines not counted."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


Rows: TypeAlias = "Iterator[tuple[Place, dict[str, object] | Problem]]"
"""Places, each with its row or with what is wrong with the row."""
