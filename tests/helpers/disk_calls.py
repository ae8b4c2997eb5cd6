"""What a process asks of the disk: fsyncs and renames, in order."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class DiskCalls:
    """Times are those of the file system's clock, in ns."""

    synced: dict[str, int] = field(default_factory=dict)
    """Path at that time -> its last fsync."""
    renamed: list[tuple[str, str, int]] = field(default_factory=list)
    """From, to, when."""

    def __add__(self, other: DiskCalls) -> DiskCalls:
        last = {path: max(self.synced.get(path, 0), when) for path, when in other.synced.items()}
        return DiskCalls(self.synced | last, sorted([*self.renamed, *other.renamed], key=lambda one: one[2]))

    def not_durable(self, target: Path) -> list[str]:
        """What could be lost of `target`, a file or a folder that was renamed to its name: its content, of all in it too,
        if that changed after the last fsync, or had none before the rename; and its name."""
        source, _, when = [one for one in self.renamed if one[1] == str(target)][-1]
        lost = []
        for path in [target, *target.rglob("*")]:
            before = str(Path(source) / path.relative_to(target))
            synced = self.synced.get(before, 0)
            if not path.stat().st_mtime_ns <= synced <= when:
                lost.append(str(path))
        return lost + ([f"the name {target}"] if self.synced.get(str(target.parent), 0) < when else [])


@contextlib.contextmanager
def disk_calls() -> Iterator[DiskCalls]:
    """Follows this process's calls to os.fsync, os.replace and os.rename."""
    calls = DiskCalls()
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def followed_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.synced[os.readlink(f"/proc/self/fd/{descriptor}")] = time.time_ns()

    def followed(function: Any) -> Any:
        def call(source: Any, target: Any) -> None:
            when = time.time_ns()
            function(source, target)
            calls.renamed.append((os.fspath(source), os.fspath(target), when))

        return call

    os.fsync, os.replace, os.rename = followed_fsync, followed(replace), followed(rename)
    try:
        yield calls
    finally:
        os.fsync, os.replace, os.rename = fsync, replace, rename
