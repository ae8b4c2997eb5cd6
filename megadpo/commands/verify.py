"""Say whether checkpoints are as they were written: megadpo verify results/dpo/step_*

Every byte of every file is held against manifest.json. Exit code 0: whole; 2: every damaged file on stderr, and folders
without a manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megadpo.commands import command_parser
from megadpo.config.problems import Attempts, ConfigError, Problem
from megadpo.model.manifest import MANIFEST_FILE, no_manifest, verify


def main(arguments: Sequence[str]) -> int:
    """Verify; returns the exit code. Raises ConfigError with every damaged file of every folder."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="step_<N> of a run, or what megadpo import made")
    attempt = Attempts()
    for folder in parser.parse_args(arguments).folders:
        if attempt(partial(_require_whole, folder)):
            print(f"{folder}: whole")
    attempt.refuse()
    return 0


def _require_whole(folder: Path) -> bool:
    if not verify(folder):
        raise ConfigError(Problem(str(folder), f"no {MANIFEST_FILE}", "a checkpoint with one", no_manifest(folder)))
    return True
