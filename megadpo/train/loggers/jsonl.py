"""metrics.jsonl, which every run writes.

<log_dir>/metrics.jsonl                          one JSON object for each call of `log`
<log_dir>/metrics.superseded-<UTC time>.jsonl    lines of steps that a resumed run repeats (see `move_later_lines`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from itertools import chain, count
from pathlib import Path

from megadpo.files.atomic import write_then_rename
from megadpo.train.loggers.base import Number

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """metrics.jsonl: lines {"step": 12, "epoch": 0, "train/loss": 0.69, ...}. `log` returns after the line is written."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self.superseded = move_later_lines(path, resumed_step=resumed_step)
        """The file that lines of an earlier run were moved to, or None."""
        # Unbuffered: a logged line survives the end of the process, and a full disk raises at once
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        # JSON has no nan and no infinity; null can be read by every parser
        finite = {n: None if v is None or not math.isfinite(v) else v for n, v in metrics.items()}
        rest = memoryview(json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n")
        while rest:  # on a nearly full disk a raw write may write only a part; then the next one raises
            rest = rest[self._file.write(rest) :]

    def close(self, exit_code: int) -> None:
        self._file.close()


def move_later_lines(path: Path, *, resumed_step: int) -> Path | None:
    """Moves the lines of steps after `resumed_step` (0: all lines) from metrics.jsonl to a second file.

    Such lines exist if a run was killed after its last checkpoint; the resumed run repeats these steps. Lines that are not
    a JSON object with a step, such as a truncated last line, are moved too. Both files are written under another name and
    renamed, the moved lines first, so every line is in one of the files at any time.

    Returns the file with the moved lines; None if there are none. Raises OSError.
    """
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    is_kept = [_is_kept(line, resumed_step) for line in lines]
    kept = [line for line, keep in zip(lines, is_kept, strict=True) if keep]
    moved = [line for line, keep in zip(lines, is_kept, strict=True) if not keep]
    superseded = None
    if moved:
        superseded = _unused_path(path)
        _write_whole(superseded, moved)
    if moved or (kept and not kept[-1].endswith(b"\n")):
        _write_whole(path, kept)
    return superseded


def _is_kept(line: bytes, resumed_step: int) -> bool:
    if resumed_step == 0:
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    step = record.get("step") if isinstance(record, dict) else None
    return isinstance(step, int) and step <= resumed_step


def _unused_path(path: Path) -> Path:
    """metrics.superseded-20260131T235959Z.jsonl, with -2, -3, ... if that exists."""
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    suffixes = chain([""], (f"-{number}" for number in count(2)))
    names = (path.with_name(f"{path.stem}.superseded-{now}{suffix}{path.suffix}") for suffix in suffixes)
    return next(name for name in names if not name.exists())


def _write_whole(path: Path, lines: list[bytes]) -> None:
    """Replaces the file by these lines; each gets a newline at its end."""
    with write_then_rename(path) as partial:
        partial.write_bytes(b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines))
