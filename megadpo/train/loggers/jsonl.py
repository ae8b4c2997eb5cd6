"""metrics.jsonl, which every run writes; a resumed run keeps what it does again in a file beside it.

<log_dir>/metrics.jsonl                          one JSON object per call of `log`
<log_dir>/metrics.superseded-<UTC time>.jsonl    lines that a resumed run does again (see `set_aside_later_lines`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from megadpo.files.atomic import write_then_rename
from megadpo.train.loggers.base import Number

METRICS_FILE = "metrics.jsonl"


class JsonLines:
    """metrics.jsonl: {"step": 12, "epoch": 0, "train/loss": 0.69, ...} per line, in the file before `log` returns."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self.superseded = set_aside_later_lines(path, resumed_step=resumed_step)
        """Where lines of an earlier run were moved to, or None."""
        # Unbuffered: a line that was logged survives the process, and a full disk is noticed at its own line.
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, Number]) -> None:
        # JSON has no nan and no infinity: null keeps the file readable for every parser.
        finite = {n: None if v is None or not math.isfinite(v) else v for n, v in metrics.items()}
        rest = memoryview(json.dumps({"step": step, **finite}, allow_nan=False).encode() + b"\n")
        while rest:  # a raw write may stop short on a nearly full disk; the next one then raises
            rest = rest[self._file.write(rest) :]

    def close(self, exit_code: int) -> None:
        self._file.close()


def set_aside_later_lines(path: Path, *, resumed_step: int) -> Path | None:
    """Move the lines of steps after `resumed_step` (0: all lines) from a metrics.jsonl into a file beside it.

    They are there when a run was killed after its last checkpoint: the resumed run does those steps again. A line that
    is not a JSON object with a step, such as a last one cut short, is moved too. Both files are written aside and
    renamed, the moved lines first, so that no moment exists at which a line is in neither.

    Returns the file with the moved lines; None, and nothing is touched, where there are none. Raises OSError.
    """
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    is_kept = [_is_kept(line, resumed_step) for line in lines]
    kept = [line for line, keep in zip(lines, is_kept, strict=True) if keep]
    moved = [line for line, keep in zip(lines, is_kept, strict=True) if not keep]
    aside = None
    if moved:
        aside = _unused_path(path)
        _write_whole(aside, moved)
    if moved or (kept and not kept[-1].endswith(b"\n")):
        _write_whole(path, kept)
    return aside


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
    """metrics.superseded-20260131T235959Z.jsonl, with -2, -3, ... where that exists."""
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    number = 1
    while True:
        suffix = "" if number == 1 else f"-{number}"
        candidate = path.with_name(f"{path.stem}.superseded-{now}{suffix}{path.suffix}")
        if not candidate.exists():
            return candidate
        number += 1


def _write_whole(path: Path, lines: list[bytes]) -> None:
    """The file holds all lines or is as it was; each line ends with a newline."""
    with write_then_rename(path) as partial:
        partial.write_bytes(b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines))
