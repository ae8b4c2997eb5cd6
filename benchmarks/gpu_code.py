"""Which code a result is of, and whether an earlier result still holds: `python benchmarks/gpu_code.py` prints the digest.

No torch here: gpu_tests.py reads this before the tests have set how many threads torch starts.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
CODE = ("megadpo/**/*.py", "megadpo/**/*.yaml", "benchmarks/*.py", "benchmarks/*.sh", "tests/**/*.py")


def digest(repository: Path = REPOSITORY) -> str:
    """SHA-256 over the names and bytes of CODE's files. It says more than a commit: two trees with changes differ in it, and
    a copy without git has one."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in CODE for path in repository.glob(pattern)}):
        content = path.read_bytes()
        found.update(f"{path.relative_to(repository).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


def commit() -> str:
    """git's, and whether there are changes; $MEGADPO_COMMIT in a copy without git."""
    asked = _git("rev-parse", "HEAD")
    if not asked:
        return os.environ.get("MEGADPO_COMMIT", "unknown")
    return asked + (" with changes" if _git("status", "--short") else "")


def continues(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether results stand beside each other, by two `gpu_machine.machine()`."""
    return all(earlier.get(name) == now.get(name) for name in ("gpu", "code", "versions", "environment"))


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    print(digest())
