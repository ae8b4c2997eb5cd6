"""Reads the rows of a source, and a digest of its content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megadpo.config.data_source import COMPRESSIONS, FILE_SUFFIXES, DataSource, file_suffix, parse_source
from megadpo.config.problems import DataError, Problem, first_line
from megadpo.data.sources import Rows
from megadpo.data.sources.json_objects import json_rows
from megadpo.data.sources.tables import (
    WRITE_AGAIN,
    arrow_rows,
    dataset_digest,
    dataset_rows,
    file_digest,
    parquet_rows,
)
from megadpo.data.sources.text import csv_rows, jsonl_rows
from megadpo.files.jsonl import UNREADABLE

_OTHER_COMPRESSIONS = (".bz2", ".xz", ".lz4", ".zip", ".7z")

_FILE_ROWS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}


def read_rows(source: str | Path) -> Rows:
    """The rows of a source, in order and in constant memory (but .json files are read whole).

    source: a file (.jsonl, .json, .csv, these also .gz or .zst; .parquet, .arrow), a folder of such files, or a hub
    data set, in the syntax of `config.data_source.parse_source`.

    A row that is not an object is given as a Problem. Raises DataError if the source is missing, truncated, damaged, of
    unknown kind, or has no rows.
    """
    parsed = _resolve(str(source))
    rows = 0
    try:
        for row in _rows_of(parsed):
            rows += 1
            yield row
    except _read_errors(parsed) as error:
        raise DataError(_unreadable(parsed, rows, error)) from error
    if rows == 0:
        fix = "write pairs to it, or name another source"
        raise DataError(Problem(str(parsed), "a file without rows", "a row for each pair", fix))


def source_digest(source: str | Path) -> str:
    """64 hexadecimal digits that depend on the content of a source, not on its path. Raises DataError."""
    parsed = _resolve(str(source))
    try:
        return dataset_digest(parsed) if _is_dataset(parsed) else file_digest(Path(parsed.path))
    except OSError as error:
        raise DataError(_unreadable(parsed, 0, error)) from error


def source_state(source: str | Path) -> dict[str, list[int]]:
    """Absolute path -> [size, inode, mtime in ns, ctime in ns] of each file that `source_digest` reads. Empty for a hub
    data set. Only the kernel sets ctime, so every later write or replacement changes the state, even if the mtime was
    set back. Raises OSError."""
    path = Path(_resolve(str(source)).path)
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path] * path.is_file()
    states = {os.path.abspath(file): file.stat() for file in sorted(files)}
    return {name: [one.st_size, one.st_ino, one.st_mtime_ns, one.st_ctime_ns] for name, one in states.items()}


def _resolve(text: str) -> DataSource:
    """An existing path is that path, even if it looks like a hub name."""
    return DataSource(text) if os.path.exists(text) else parse_source(text)


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
        raise DataError(Problem(str(source), got, "a file alone: only folders and hub data sets have splits", fix))
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


def _read_errors(source: DataSource) -> tuple[type[Exception], ...]:
    """The exceptions of reading a missing, truncated or damaged file."""
    if file_suffix(source.path) in (".parquet", ".arrow"):
        import pyarrow

        return *UNREADABLE, pyarrow.ArrowException
    return UNREADABLE


def _unreadable(source: DataSource, rows: int, error: Exception) -> Problem:
    reason = getattr(error, "strerror", None) or first_line(error)
    is_wrong_path = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    return Problem(
        where=str(source),
        value=reason if not rows else f"{reason} (after {rows} rows)",
        expected="a file that can be read",
        fix="check data.train_data_path and data.val_data_paths; relative paths begin at the working directory"
        if is_wrong_path
        else WRITE_AGAIN,
    )
