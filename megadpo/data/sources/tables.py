"""Rows of columnar data: Parquet and Arrow files, saved and hub datasets. All are read in small batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megadpo.config.data_source import DataSource, file_suffix
from megadpo.config.problems import DataError, Problem
from megadpo.data.sources import MOST_PROBLEMS, Place, Rows
from megadpo.data.sources.json_objects import json_rows
from megadpo.data.sources.text import duplicate_columns, jsonl_rows
from megadpo.files.regular import require_regular

_BATCH_ROWS = 256
_DIGEST_BYTES = 2**22
_ARROW_FILE = b"ARROW1"
_METADATA_FILES = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

WRITE_AGAIN = "write the file again: it is truncated or damaged, or its name has the wrong ending"


def parquet_rows(path: Path) -> Rows:
    """The rows of a Parquet file. Raises OSError, or pyarrow.ArrowException (a ValueError for most damage)."""
    import pyarrow.parquet

    require_regular(path)
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
        yield from _numbered(str(path), file.iter_batches(batch_size=_BATCH_ROWS))


def arrow_rows(path: Path) -> Rows:
    """The rows of an Arrow IPC file or stream (`datasets` writes streams). Raises as parquet_rows does."""
    import pyarrow

    require_regular(path)
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
    """The rows of a folder or hub data set. The library `datasets` keeps them in its own cache and maps them into memory.
    Raises DataError."""
    table = _load_dataset(source)
    pages = range(0, len(table), _BATCH_ROWS)
    batches = (table.with_format("arrow")[start : start + _BATCH_ROWS] for start in pages)
    yield from _numbered(str(source), batches)


def dataset_digest(source: DataSource) -> str:
    """64 hexadecimal digits that change if the rows of `dataset_rows` change. For a folder: a hash of its files. For a
    hub data set: the fingerprint that `datasets` keeps of its download. Raises DataError and OSError."""
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
    require_regular(path)
    with path.open("rb") as file:
        while piece := file.read(_DIGEST_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _numbered(path: str, batches: Iterator[Any]) -> Rows:
    """Rows with their places, from pyarrow's record batches or tables of any size. Only a few rows at a time become
    Python objects. Raises DataError if two columns have the same name."""
    number = 0
    readers: dict[str, Callable[[Any], Any]] | None = None
    for batch in batches:
        if readers is None:
            if twice := duplicate_columns(path, batch.schema.names):
                raise DataError(twice)
            readers = {field.name: _reader(field.type) for field in batch.schema}
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                yield Place(path, number + 1, number), {key: readers[key](value) for key, value in row.items()}
                number += 1


def _reader(kind: Any) -> Callable[[Any], Any]:
    """A function that converts pyarrow's values of this type: it drops nulls and reads JSON text. (`datasets` stores
    columns of mixed types as JSON text.)"""
    import pyarrow.types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda value: _without_nulls(json.loads(value)) if isinstance(value, str) else value
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        inner = _reader(kind.value_type)
        return lambda value: value if value is None else [inner(one) for one in value]
    if pyarrow.types.is_struct(kind):
        inside = {field.name: _reader(field.type) for field in kind}
        return lambda value: (
            value if value is None else {key: inside[key](one) for key, one in value.items() if one is not None}
        )
    return _without_nulls


def _without_nulls(value: Any) -> Any:
    """Removes null entries at any depth: a column gives every object all keys, and null for keys that it lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _load_dataset(source: DataSource) -> Any:
    """The split as a `datasets.Dataset`. Catches every exception: `datasets` raises its own and those of HTTP clients."""
    import datasets

    split = source.split or "train"
    try:
        if (Path(source.path) / "state.json").is_file():
            return datasets.load_from_disk(source.path)
        if (Path(source.path) / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(source.path)
            if split not in splits:
                raise DataError(_no_split(source, split, list(splits)))
            return splits[split]
        if Path(source.path).is_dir():
            # Own cache folder: for a folder with a README, `datasets` uses its old cache even after a file changed
            cache = Path(datasets.config.HF_DATASETS_CACHE) / f"megadpo-{dataset_digest(source)[:32]}"
            builder = datasets.load_dataset_builder(source.path, source.subset, cache_dir=str(cache))
            files = {str(name): [Path(file) for file in of] for name, of in (builder.config.data_files or {}).items()}
            return _load_folder(source, split, files, str(cache))
        return datasets.load_dataset(source.path, source.subset, split=split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(_not_loaded(source, split, error)) from error


def _load_folder(source: DataSource, split: str, files: dict[str, list[Path]], cache: str) -> Any:
    """A split of a folder. `files`: split -> files, as `datasets` found them. Raises DataError for data files that belong
    to no split, and for rows that can't be read, with file and line."""
    import datasets

    named = [part.partition("[")[0].strip() for part in split.split("+")]
    if files and not {*named} <= {*files, "all"}:
        raise DataError(_no_split(source, split, list(files)))
    if problems := _unread_files(Path(source.path), [file for of in files.values() for file in of]):
        raise DataError(problems)
    try:
        return datasets.load_dataset(source.path, source.subset, split=split, cache_dir=cache)
    except datasets.exceptions.DatasetGenerationError as error:
        broken = _broken_rows(files.get(split.partition("[")[0], []))
        raise DataError(broken or [_not_loaded(source, split, error)]) from error


def _unread_files(folder: Path, read: list[Path]) -> list[Problem]:
    """The data files of a folder that belong to no split. None for a clone of a hub data set (its README has a header):
    there the authors chose the files."""
    readme = folder / "README.md"
    if readme.is_file() and readme.read_text(encoding="utf-8", errors="replace").startswith("---"):
        return []
    known = {file.resolve() for file in read}
    expected = "a file that one of the folder's splits reads"
    fix = "move it away, or give the files of a split one kind and that split's name, such as train-1.jsonl"
    return [
        Problem(str(file), "a file that would not be read", expected, fix)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file_suffix(file.name) is not None
        and file.name not in _METADATA_FILES
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
        and file.resolve() not in known
    ][:MOST_PROBLEMS]


def _broken_rows(files: list[Path]) -> list[Problem]:
    """What is wrong in JSON files that `datasets` could not read. (Its own error names neither file nor line.)"""
    problems: list[Problem] = []
    for file in files:
        reader = {".jsonl": jsonl_rows, ".json": json_rows}.get(file_suffix(file.name) or "")
        if reader is None:
            continue
        try:
            problems += [row for _, row in reader(file) if isinstance(row, Problem)][:MOST_PROBLEMS]
        except (OSError, EOFError) as error:
            problems.append(Problem(str(file), str(error), "a file that can be read", WRITE_AGAIN))
    return problems[:MOST_PROBLEMS]


def _no_split(source: DataSource, split: str, splits: list[str]) -> Problem:
    got = f"no split {split!r}" + ("" if source.split else ", which is taken where none is named")
    wanted = DataSource(source.path, source.subset, splits[0]) if splits else source
    return Problem(str(source), got, f"one of its splits: {', '.join(splits)}", f"name one, for example {wanted}")


def _not_loaded(source: DataSource, split: str, error: Exception) -> Problem:
    while error.__cause__ is not None and type(error).__name__ == "DatasetGenerationError":
        error = error.__cause__  # type: ignore[assignment]  # the outer text says only that something failed
    lines = str(error).strip().splitlines() or ["no reason given"]
    reason = f"{type(error).__name__}: {' ... '.join(dict.fromkeys([lines[0], lines[-1]]))}"
    if Path(source.path).exists():
        expected = "a folder of data files, or a folder written by save_to_disk"
        fix = "name a folder that holds such files, or a file, in data.train_data_path and data.val_data_paths"
        if source.subset or source.split:
            fix += f"; it must have the split {split!r}" + (f" of {source.subset!r}" if source.subset else "")
    else:
        expected = f"a dataset of the Hugging Face hub with the split {split!r}"
        fix = (
            "check the name in data.train_data_path and data.val_data_paths (org/name:subset@split), and the network; "
            "without a network, download the data set elsewhere "
            f"(hf download --repo-type dataset {source.path} --local-dir FOLDER) and name FOLDER"
        )
    return Problem(str(source), reason, expected, fix)
