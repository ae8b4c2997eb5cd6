"""Sources of rows -> PreferencePairs. Every problem of a source is found before any is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megadpo.config.data_source import COMPRESSIONS, FILE_SUFFIXES, DataSource, file_suffix, parse_source
from megadpo.config.problems import DataError, Problem
from megadpo.data.formats.messages import Place
from megadpo.data.formats.recognise import FORMATS, FieldKeys, RowFormat, find_format, recognise
from megadpo.data.pairs import PreferencePair
from megadpo.data.sources.tables import arrow_rows, dataset_digest, dataset_rows, file_digest, parquet_rows
from megadpo.data.sources.text import Rows, csv_rows, json_rows, jsonl_rows
from megadpo.files.jsonl import UNREADABLE

MOST_PROBLEMS = 20
"""A source with more problems than this is not read to its end."""

_OTHER_COMPRESSIONS = (".bz2", ".xz", ".lz4", ".zip", ".7z")

OnBadRow = Literal["refuse", "drop"]

_FILE_ROWS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}


@dataclass
class ReadCounts:
    """What a reading found, complete when it has ended."""

    rows: int = 0
    bad_rows: list[Problem] = field(default_factory=list)
    """The first MOST_PROBLEMS problems of rows left out."""
    dropped_bad_rows: int = 0
    """Rows left out, with `on_bad_row` drop."""


def read_pairs(
    source: str | Path,
    keys: FieldKeys | None = None,
    *,
    dataset_name: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    counts: ReadCounts | None = None,
) -> list[PreferencePair]:
    """As `iterate_pairs`, all at once."""
    return list(iterate_pairs(source, keys, dataset_name=dataset_name, on_bad_row=on_bad_row, counts=counts))


def iterate_pairs(
    source: str | Path,
    keys: FieldKeys | None = None,
    *,
    dataset_name: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    counts: ReadCounts | None = None,
) -> Iterator[PreferencePair]:
    """The good pairs of a source, in its order and, but for .json files, in constant memory.

    source: a file (.jsonl, .json, .csv, these also .gz or .zst; .parquet, .arrow), a folder of such, or a dataset of
    the hub, as `config.data_source.parse_source` takes them apart. dataset_name: the format of the rows; without it the
    first good row decides, and a row of another format is bad. counts: filled in.

    Raises DataError at the end, or after MOST_PROBLEMS problems, each with file:line: a missing, unreadable or empty
    source; broken UTF-8 or JSON; a row that its format refuses. With on_bad_row drop such rows are left out and
    counted, and it raises only for sources that can't be read or of which nothing is left."""
    keys = keys or FieldKeys()
    counts = ReadCounts() if counts is None else counts
    whole = _resolve(str(source))
    named = None if dataset_name is None else FORMATS[dataset_name]
    reading = _Reading(keys, named)
    try:
        for place, row in _rows_of(whole):
            counts.rows += 1
            read = [row] if isinstance(row, Problem) else reading.pair(row, place)
            if isinstance(read, PreferencePair):
                yield read
                continue
            counts.dropped_bad_rows += 1
            counts.bad_rows += read[: MOST_PROBLEMS - len(counts.bad_rows)]
            if on_bad_row == "refuse" and len(counts.bad_rows) >= MOST_PROBLEMS:
                raise DataError([*counts.bad_rows, _too_many(place)])
    except _damage(whole) as error:
        # What was found so far is said too: the file's end is not the only thing to mend
        raise DataError([*counts.bad_rows, _unreadable(whole, counts.rows, error)]) from error
    if counts.rows == 0:
        fix = "write pairs to it, or name another source"
        raise DataError(Problem(str(whole), "a file without rows", "a row for each pair", fix))
    if counts.bad_rows and (on_bad_row == "refuse" or counts.dropped_bad_rows == counts.rows):
        raise DataError(counts.bad_rows)


def source_digest(source: str | Path) -> str:
    """64 hexadecimal digits that change with the rows of a source, and not with its place. Raises DataError."""
    whole = _resolve(str(source))
    try:
        return dataset_digest(whole) if _is_dataset(whole) else file_digest(Path(whole.path))
    except OSError as error:
        raise DataError(_unreadable(whole, 0, error)) from error


class _Reading:
    """The format of one source: named, or that of its first good row."""

    def __init__(self, keys: FieldKeys, named: RowFormat | None) -> None:
        self.keys = keys
        self.named = named
        self.found: RowFormat | None = None
        self.found_at: Place | None = None

    def pair(self, row: dict[str, object], place: Place) -> PreferencePair | list[Problem]:
        if self.named is not None:
            return self.named.read(row, self.keys, place)
        own = find_format(row, self.keys)
        if self.found is not None and own is not None and own is not self.found:
            fix = "keep one format a file: split it, or rewrite these rows"
            expected = f"one of {self.found.name}, as line {self.found_at.line if self.found_at else 1} has it"
            return [Problem(str(place), f"a row of the format {own.name}", expected, fix)]
        row_format = own or self.found or recognise(row, self.keys)
        read = row_format.read(row, self.keys, place)
        if self.found is None and isinstance(read, PreferencePair):
            self.found, self.found_at = row_format, place
        return read


def _resolve(text: str) -> DataSource:
    """A path that is there is that path, whatever its name looks like."""
    return DataSource(text) if Path(text).exists() else parse_source(text)


def _is_dataset(source: DataSource) -> bool:
    path = Path(source.path)
    return path.is_dir() or (not path.exists() and source.is_hub_name)


def _rows_of(source: DataSource) -> Rows:
    path = Path(source.path)
    suffix = file_suffix(source.path)
    if _is_dataset(source):
        return dataset_rows(source)
    if source.subset or source.split:
        got = f"the file {source.path} with a subset or split"
        fix = f"write {source.path} alone"
        raise DataError(Problem(str(source), got, "a file, which is read whole; only folders have splits", fix))
    compressed = path.name.lower().endswith((*COMPRESSIONS, *_OTHER_COMPRESSIONS))
    if suffix is None or (compressed and suffix in (".parquet", ".arrow")):
        kinds = ", ".join(FILE_SUFFIXES)
        expected = f"a name that ends in one of {kinds} (text also with {' or '.join(COMPRESSIONS)}), or org/name"
        where = "data.train_data_path or data.val_data_paths"
        got, fix = "no such file", f"check the path or hub name in {where}"
        if suffix is not None or (compressed and path.exists()):
            got, fix = "a compressed columnar file" if suffix else "a file of unknown compression", "uncompress it"
        elif path.exists():
            got, fix = "a file of unknown kind", f"rename the file by its kind, in {where} too"
        raise DataError(Problem(str(source), got, expected, fix))
    return _FILE_ROWS[suffix](path)


def _damage(source: DataSource) -> tuple[type[Exception], ...]:
    """What reading a missing, cut off or damaged file raises."""
    if file_suffix(source.path) in (".parquet", ".arrow"):
        import pyarrow

        return *UNREADABLE, pyarrow.ArrowException
    return UNREADABLE


def _too_many(place: Place) -> Problem:
    return Problem(
        where=str(place),
        value=f"{MOST_PROBLEMS} problems so far",
        expected="none",
        fix="mend these first: the rest of the file was not read",
    )


def _unreadable(source: DataSource, rows: int, error: Exception) -> Problem:
    said = getattr(error, "strerror", None) or str(error).strip().splitlines()[:1] or type(error).__name__
    said = said[0] if isinstance(said, list) else said
    missing = isinstance(error, FileNotFoundError)
    return Problem(
        where=str(source),
        value=said if not rows else f"{said} (after {rows} rows)",
        expected="a file that can be read",
        fix="check data.train_data_path and data.val_data_paths: a path is taken from where the run was started"
        if missing or isinstance(error, PermissionError | IsADirectoryError)
        else "write the file again: it is cut off or damaged, or not what its name says",
    )
