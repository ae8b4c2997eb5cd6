"""Token ids on disk. One process of a node makes them; then all its processes map them into memory.

A cache is a folder `<key>` in `data.cache_dir`. Each array is a file of little-endian numbers. header.json has the
lengths and sha256 of the arrays, the report of the data file and its fingerprint. The folder is written under another
name and renamed, so it is complete or absent. Every process that opens it reads it once (about a second per gigabyte)
and checks the hashes, because a flipped bit would be a wrong token in every epoch.

The same folder has notes, by which the processes of one start tell each other a source's digest, or why a source was
refused. A note is valid for minutes only; a later start reads the source itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from megadpo.config.problems import ConfigError, DataError, Problem
from megadpo.data.pairs import DataReport, PairDataset
from megadpo.data.sources.rows import source_digest, source_state
from megadpo.data.tokens.encode import Sink

_DTYPES = {"tokens": "<i4", "offsets": "<i8", "rows": "<i8", "identities": "<i8", "values": "<f8", "lines": "<i8"}
_HEADER = "header.json"
_READ_BYTES = 1 << 22
_NOTE_LIFETIME_S = 600.0
"""Older notes are ignored."""
_SETTLED_S = 2.0
"""A file that changed less than this ago may change again without a new time stamp."""


class _Damaged(Exception):
    """A cache whose files differ from what was written."""


class TokenCache:
    """The caches in one folder."""

    def __init__(self, folder: str | Path) -> None:
        """`folder` is created when something is written to it; ~ is the home folder."""
        self.folder = Path(folder).expanduser()

    def source_digest(self, source: str) -> str:
        """`sources.rows.source_digest`, computed once on each node: one process writes it to a note; the others wait for
        the lock and read the note.

        A note can't hide a change: it is used only if every file still has the size, inode and times from before it was
        hashed, and no note is written for files that have just changed. If the folder can't be written, each process
        hashes the source itself. Raises DataError.
        """
        try:
            state = source_state(source)
            now_ns = time.time_ns()
            if now_ns - max((changed_ns for *_, changed_ns in state.values()), default=now_ns) < _SETTLED_S * 1e9:
                return source_digest(source)
            name = "source-" + hashlib.sha256("\n".join(state).encode() + source.encode()).hexdigest()[:32]
            with self._locked(name):
                note = self.folder / f"{name}.json"
                known = _read_note(note)
                if known is not None and known.get("state") == state:
                    return str(known["digest"])
                digest = source_digest(source)
                if source_state(source) == state:
                    _write_note(note, {"state": state, "digest": digest})
                return digest
        except (ConfigError, OSError):
            return source_digest(source)

    def open_or_build(self, key: str, path: str, build: Callable[[Sink], DataReport]) -> PairDataset:
        """The source `path` from the cache `key`, with its arrays mapped read-only.

        If there is no cache, or a damaged one, one process of the node builds it and the others wait. Raises what `build`
        raises, also in the processes that waited, and ConfigError if the folder can't be written.
        """
        found = self._open(key, path)
        if found is not None:
            return found
        refusal = self.folder / f"{key}.refused.json"
        with self._locked(key):
            found = self._open(key, path, say_why=True)
            if found is None:
                _raise_again(refusal, path)
                try:
                    self._build(key, build)
                except DataError as error:
                    problems = [dataclasses.asdict(problem) for problem in error.problems]
                    _write_note(refusal, {"path": path, "problems": problems})
                    raise
                found = self._open(key, path, say_why=True)
        if found is None:
            raise self._unusable("a cache that reads back differently", "a disk that returns what was written")
        return found

    def _open(self, key: str, path: str, *, say_why: bool = False) -> PairDataset | None:
        """The cache; None if it is absent or damaged."""
        place = self.folder / key
        try:
            return _read(place, key, path)
        except FileNotFoundError:
            if not place.exists():
                return None
            reason = "a file is missing"
        except (_Damaged, OSError) as error:
            reason = str(error)
        if say_why:
            print(f"{place}: damaged ({reason}); it is built again", file=sys.stderr, flush=True)
        return None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / f"{key}.lock")
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise self._unwritable(error) from error
        try:
            yield
        finally:
            lock.release()

    def _build(self, key: str, build: Callable[[Sink], DataReport]) -> None:
        """Writes the cache under another name and renames it. The caller holds the lock."""
        prefix = f"{key}.building-{socket.gethostname()}-"
        for left in self.folder.glob(f"{prefix}*"):  # from a process that was killed: no other one has the lock now
            shutil.rmtree(left, ignore_errors=True)
        try:
            unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            with _Writer(unfinished, self._unwritable) as writer:
                writer.finish(key, build(writer.append))
            self._rename(unfinished, self.folder / key)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _rename(self, unfinished: Path, place: Path) -> None:
        try:
            if place.exists():  # a damaged cache; a process that has mapped it can go on reading it
                shutil.rmtree(place)
            os.rename(unfinished, place)
        except OSError as error:
            if not place.exists():  # if it exists, another machine with this folder has built the same cache
                raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> ConfigError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return self._unusable(str(self.folder), f"a folder that can be written ({reason})")

    def _unusable(self, value: str, expected: str) -> ConfigError:
        fix = "free some space, name another folder, or set it to null: then each process tokenises into its own memory"
        return ConfigError(Problem("data.cache_dir", value, expected, fix))


class _Writer:
    """Appends the arrays of a cache to their files, and hashes them."""

    def __init__(self, folder: Path, config_error: Callable[[Exception], ConfigError]) -> None:
        self._folder = folder
        self._config_error = config_error
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in _DTYPES}
        self._hashes = {name: hashlib.sha256() for name in _DTYPES}
        self._lengths = dict.fromkeys(_DTYPES, 0)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # an earlier error has been reported already
                file.close()

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Raises ConfigError if they can't be written."""
        data = np.ascontiguousarray(values.astype(_DTYPES[name], copy=False)).view(np.uint8).data
        self._hashes[name].update(data)
        self._lengths[name] += len(values)
        try:
            self._files[name].write(data)
        except OSError as error:
            raise self._config_error(error) from error

    def finish(self, key: str, report: DataReport) -> None:
        """Closes the arrays and writes the header. Raises ConfigError."""
        header = {
            "key": key,
            "report": dataclasses.asdict(report),
            "arrays": {
                name: {"dtype": dtype, "length": self._lengths[name], "sha256": self._hashes[name].hexdigest()}
                for name, dtype in _DTYPES.items()
            },
        }
        try:
            for file in self._files.values():
                file.close()
            (self._folder / _HEADER).write_text(json.dumps({"header": header, "sha256": _json_hash(header)}, indent=1))
        except OSError as error:
            raise self._config_error(error) from error


def _read(place: Path, key: str, path: str) -> PairDataset:
    """The cache in the folder `place`. Raises FileNotFoundError, OSError or _Damaged."""
    header = _read_header(place / _HEADER)
    if header["key"] != key:
        raise _Damaged(f"{_HEADER} belongs to {header['key']}")
    mapped = {name: _map(place / f"{name}.bin", described) for name, described in header["arrays"].items()}
    arrays = {
        name: np.frombuffer(mapped[name], dtype=described["dtype"]) for name, described in header["arrays"].items()
    }
    report = DataReport(**{**header["report"], "path": path})
    return PairDataset(**arrays, report=report, release=lambda: mapped["tokens"].madvise(mmap.MADV_DONTNEED))


def _read_header(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_bytes())
        header: dict[str, Any] = stored["header"]
        whole = stored["sha256"] == _json_hash(header)
    except (ValueError, KeyError, TypeError) as error:
        raise _Damaged(f"{path.name} can't be read") from error
    if not whole:
        raise _Damaged(f"{path.name} has been changed")
    return header


def _map(path: Path, described: dict[str, Any]) -> mmap.mmap:
    """The file of an array, checked and mapped read-only."""
    expected = described["length"] * np.dtype(described["dtype"]).itemsize
    size = path.stat().st_size
    if size != expected or size == 0:
        raise _Damaged(f"{path.name} has {size} bytes, not {expected}")
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:  # read, not mapped: mapped pages would count as this process's memory
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
        if digest.hexdigest() != described["sha256"]:
            raise _Damaged(f"{path.name} has been changed")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _json_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_note(place: Path, note: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        place.write_text(json.dumps(note, default=str))


def _read_note(place: Path) -> dict[str, Any] | None:
    """The content of a note; None if it is absent, broken or too old."""
    try:
        note = json.loads(place.read_bytes())
        recent = time.time() - place.stat().st_mtime < _NOTE_LIFETIME_S
    except (OSError, ValueError):
        return None
    return note if recent and isinstance(note, dict) else None


def _raise_again(refusal: Path, path: str) -> None:
    """Raises the problems that another process found while this one waited for the lock."""
    note = _read_note(refusal)
    if note is not None and note.get("path") == path and note.get("problems"):
        raise DataError([Problem(**problem) for problem in note["problems"]])
    with contextlib.suppress(OSError):
        refusal.unlink()
