"""Sources -> preference pairs. All problems of a source are reported together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megadpo.config.problems import DataError, Problem
from megadpo.data.formats import PreferencePair, Row, RowFormat, find_format, formats_with
from megadpo.data.sources import MOST_PROBLEMS, Place
from megadpo.data.sources.rows import read_rows

OnBadRow = Literal["refuse", "drop"]
USUAL = "BinaryPreferenceDataset"
"""The format that explains what a row lacks that none recognises."""


@dataclass
class ReadCounts:
    """What `read_pairs` found; complete when it has ended."""

    rows: int = 0
    bad_rows: list[Problem] = field(default_factory=list)
    """The first MOST_PROBLEMS problems of invalid rows."""
    dropped_bad_rows: int = 0
    """Number of invalid rows."""


def read_pairs(
    source: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    dataset_name: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    counts: ReadCounts | None = None,
) -> Iterator[PreferencePair]:
    """The valid pairs of a source, in order and in constant memory (but .json files are read whole).

    source: as for `read_rows`. options: of the formats, by name; None: their defaults. dataset_name: the format of the rows;
    None: the format of the first valid row, and a row of another format is invalid. counts: is updated.

    Raises DataError at the end, or after MOST_PROBLEMS problems: those of `read_rows`, and those of invalid rows, each
    with file:line. With on_bad_row "drop" invalid rows are left out and counted; then it raises only for a source that
    can't be read or has no valid row."""
    counts = ReadCounts() if counts is None else counts
    reader = _PairReader(formats_with(options or {}), dataset_name)
    try:
        for place, row in read_rows(source):
            counts.rows += 1
            read = [row] if isinstance(row, Problem) else reader.pairs(row, place)
            if isinstance(read, tuple):
                yield from read
                continue
            counts.dropped_bad_rows += 1
            counts.bad_rows += read[: MOST_PROBLEMS - len(counts.bad_rows)]
            if on_bad_row == "refuse" and len(counts.bad_rows) >= MOST_PROBLEMS:
                break
    except DataError as error:
        # The problems found before are reported too, not only the last one
        raise DataError([*counts.bad_rows, *error.problems]) from error
    if on_bad_row == "refuse" and len(counts.bad_rows) >= MOST_PROBLEMS:
        got, fix = f"{MOST_PROBLEMS} problems so far", "correct these first: the rest of the file was not read"
        raise DataError([*counts.bad_rows, Problem(str(place), got, "none", fix)])
    if counts.bad_rows and (on_bad_row == "refuse" or counts.dropped_bad_rows == counts.rows):
        raise DataError(counts.bad_rows)


class _PairReader:
    """Reads the rows of one source in its format: the named one, or that of the first valid row."""

    def __init__(self, formats: Mapping[str, RowFormat], named: str | None) -> None:
        self.formats = formats
        self.named = named
        self.found: str | None = None
        self.found_at: Place | None = None

    def pairs(self, row: Row, place: Place) -> tuple[PreferencePair, ...] | list[Problem]:
        if self.named is not None:
            return _as_tuple(self.formats[self.named].read(row, place))
        own = find_format(row, self.formats)
        if self.found is not None and own not in (None, self.found):
            fix = "use one format in each file: split the file, or rewrite these rows"
            expected = f"a row of the format {self.found}, as in line {self.found_at.line if self.found_at else 1}"
            return [Problem(str(place), f"a row of the format {own}", expected, fix)]
        name = own or self.found or USUAL
        read = _as_tuple(self.formats[name].read(row, place))
        if self.found is None and isinstance(read, tuple):
            self.found, self.found_at = name, place
        return read


def _as_tuple(
    read: PreferencePair | tuple[PreferencePair, ...] | list[Problem],
) -> tuple[PreferencePair, ...] | list[Problem]:
    return (read,) if isinstance(read, PreferencePair) else read
