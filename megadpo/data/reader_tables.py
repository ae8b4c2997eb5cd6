"""Rows of columnar data: Parquet and Arrow files, saved and hub datasets. All are read in small batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadpo.config.data_source import DataSource
from megadpo.config.problems import DataError, Problem
from megadpo.data.formats_messages import Place
from megadpo.data.reader_text import Rows

_BATCH_ROWS = 256
_DIGEST_BYTES = 2**22
_ARROW_FILE = b"ARROW1"


def parquet_rows(path: Path) -> Rows:
    """The rows of a Parquet file. Raises OSError, or pyarrow.ArrowException (a ValueError for most damage)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        yield from _numbered(str(path), file.iter_batches(batch_size=_BATCH_ROWS))


def arrow_rows(path: Path) -> Rows:
    """The rows of an Arrow IPC file or stream (which `datasets` writes). Raises as parquet_rows."""
    import pyarrow

    with path.open("rb") as file:
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
    with pyarrow.memory_map(str(path)) as memory:
        if is_file:
            reader = pyarrow.ipc.open_file(memory)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(memory))
        yield from _numbered(str(path), batches)


def dataset_rows(source: DataSource) -> Rows:
    """The rows of a folder or hub dataset, through `datasets`, which keeps what it downloads in its own cache and maps
    it into memory. Raises DataError."""
    table = _load_dataset(source)
    pages = range(0, len(table), _BATCH_ROWS)
    batches = (table.with_format("arrow")[start : start + _BATCH_ROWS] for start in pages)
    yield from _numbered(str(source), batches)


def dataset_digest(source: DataSource) -> str:
    """64 hexadecimal digits that change with what `dataset_rows` gives. A folder counts with the content of its files,
    a hub dataset with the fingerprint that `datasets` keeps of what it downloaded. Raises DataError and OSError."""
    digest = hashlib.sha256(f"{source.subset}\n{source.split or 'train'}\n".encode())
    folder = Path(source.path)
    if not folder.is_dir():
        digest.update(str(_load_dataset(source)._fingerprint).encode())
        return digest.hexdigest()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + file_digest(path).encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_DIGEST_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _numbered(path: str, batches: Iterator[Any]) -> Rows:
    """Rows with their places; pyarrow's record batches or tables of any size, of which few rows at a time are made
    Python objects."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield Place(path, number + 1, number), {key: _without_nulls(value) for key, value in row.items()}
                number += 1


def _without_nulls(value: Any) -> Any:
    """Columns give every object every key: what one of them hasn't got is null, at any depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _load_dataset(source: DataSource) -> Any:
    """The split as a `datasets.Dataset`. `datasets` raises anything, from its own errors to those of HTTP clients."""
    import datasets

    split = source.split or "train"
    try:
        if (Path(source.path) / "state.json").is_file():
            return datasets.load_from_disk(source.path)
        if (Path(source.path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(source.path)[split]
        if Path(source.path).is_dir():
            # For a folder with a README, `datasets` goes on with what it cached before a file of it changed
            cache = Path(datasets.config.HF_DATASETS_CACHE) / f"megadpo-{dataset_digest(source)[:32]}"
            return datasets.load_dataset(source.path, source.subset, split=split, cache_dir=str(cache))
        return datasets.load_dataset(source.path, source.subset, split=split)
    except Exception as error:
        raise DataError(_not_loaded(source, split, error)) from error


def _not_loaded(source: DataSource, split: str, error: Exception) -> Problem:
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    if Path(source.path).exists():
        expected = "a folder of data files, or one that save_to_disk wrote"
        fix = "name a folder that holds such files, or a file, in data.train_data_path and data.val_data_paths"
        if source.subset or source.split:
            fix += f"; it must have the split {split!r}" + (f" of {source.subset!r}" if source.subset else "")
    else:
        expected = f"a dataset of the Hugging Face hub with the split {split!r}"
        fix = (
            "check the name in data.train_data_path and data.val_data_paths (org/name:subset@split), and the network; "
            f"without one, download it elsewhere (hf download --repo-type dataset {source.path} --local-dir FOLDER) "
            "and name FOLDER"
        )
    return Problem(str(source), said, expected, fix)
