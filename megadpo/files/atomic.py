"""Writes files and folders atomically: under a temporary name in the same folder, then renamed.

docs/running.md says what survives a power loss. `durable` means: the content is on the disk (fsync) before the rename, and the
parent folder, which has the new name, after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path


@contextlib.contextmanager
def write_then_rename(target: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path in the target's folder, where the block writes a file or a folder. It is renamed to `target` when
    the block ends, and removed if the block raises. If the block writes nothing there, the target is not changed.

    Raises OSError and the block's errors. Several processes may write one target at once: the last one wins. A killed process
    leaves `.NAME.*.partial` behind, which can be deleted (folders: `delete_left_over`)."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        if not partial.exists():
            return
        if durable:
            sync_below(partial) if partial.is_dir() else sync(partial)
        os.replace(partial, target)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # no file or no folder: the block's error says more
                partial.unlink()
        raise
    if durable:
        sync(target.parent)


def move_aside(damaged: Path) -> Path:
    """Renames a damaged file or folder to NAME.damaged, so that no run finds it; returns its new path. Raises OSError."""
    names = (f"{damaged.name}.damaged{number}" for number in ["", *range(2, 1000)])
    aside = next(path for name in names if not (path := damaged.parent / name).exists())
    os.replace(damaged, aside)
    return aside


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While the block runs, `delete_left_over` of no process deletes `folder`. A killed process releases it."""
    with _opened(folder) as descriptor:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


def delete_left_over(target: Path) -> list[Path]:
    """Deletes the temporary folders that killed processes left when they were writing `target`. Returns the folders that it
    keeps: they are `in_use`, or the file system has no locks."""
    stay = []
    for partial in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 12}.partial"):
        if not partial.is_dir():  # a file, which may still be written
            continue
        try:
            with _opened(partial) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial)
        except OSError:
            stay.append(partial)
    return stay


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_below(folder: Path, *, but: Collection[Path] = ()) -> None:
    """`sync` every file and folder in `folder`, and the folder itself. but: files whose writers have already done it."""
    for path in folder.rglob("*"):
        if path not in but:
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)
