"""Opens only ordinary files: reading a named pipe may wait for ever, and /dev/zero has no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def require_regular(path: Path) -> None:
    """Raises OSError if `path` is neither an ordinary file nor a folder, nor a link to one; also if it doesn't exist or is
    an invalid path (too long, or with NUL)."""
    try:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except ValueError as error:  # a NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if kind is not None:
        raise OSError(errno.EINVAL, f"{kind}, not a file", str(path))


def read_at_most(path: Path, most_bytes: int) -> bytes:
    """The content of an ordinary file. Raises OSError, also for a file of more than `most_bytes`."""
    require_regular(path)
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"a file of more than {most_bytes} bytes", str(path))
    return content


def not_regular(folder: Path) -> list[tuple[Path, str]]:
    """(path, kind) of each entry directly in `folder` that is no ordinary file, folder, or link to one. Raises OSError."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                require_regular(Path(entry.path))
            except FileNotFoundError:
                continue  # a broken link: code that needs the file reports it
            except OSError as error:
                found.append((Path(entry.path), str(error.strerror)))
    return sorted(found)
