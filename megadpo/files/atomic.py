"""Files and folders that are there whole or not at all: written beside their place, then renamed.

What survives a power loss is in docs/running.md. Durable there: the content is on the disk (fsync) before the rename, and
the folder, which holds the new name, after it.
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
    """Gives a path beside `target`, where the block writes a file or a folder. It takes the target's name when the block
    ends, and is removed when the block raises. A block that leaves nothing there leaves the target as it was.

    Raises OSError, and whatever the block raises. Several processes may write one target at once: the last one wins. A
    process that is killed leaves `.NAME.*.partial` behind, which can be deleted (folders: `delete_left_over`)."""
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
            with contextlib.suppress(OSError):  # nothing there, or no folder at all: the block's error says more
                partial.unlink()
        raise
    if durable:
        sync(target.parent)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """While the block runs, `delete_left_over` of any process leaves `folder` alone; not after this process was killed."""
    with _opened(folder) as descriptor:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


def delete_left_over(target: Path) -> list[Path]:
    """Deletes the folders in which killed processes were writing what `target` was to be. Returns those that stay: they are
    `in_use`, or the file system can't tell."""
    stay = []
    for partial in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 12}.partial"):
        if not partial.is_dir():  # a file's writer, which may be at work
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
    """`sync` of every file and folder in `folder`, and of itself; `but`: files whose writers have done it."""
    for path in folder.rglob("*"):
        if path not in but:
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)
