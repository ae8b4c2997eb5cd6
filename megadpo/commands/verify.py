"""Say whether checkpoints are as they were written: megadpo verify results/dpo

A checkpoint, or a run's folder for all in it. Every byte of every file is held against manifest.json. Exit code 0: whole;
2: every damaged file on stderr, and folders without a manifest.
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
    parser.add_argument("folders", nargs="+", type=Path, help="a run's, its step_<N>, or what megadpo import made")
    given = parser.parse_args(arguments).folders
    from megadpo.checkpoint.folder import step_folders  # with torch: not for --help

    attempt = Attempts()
    for checkpoint in (one for folder in given for one in step_folders(folder) or [folder]):
        if attempt(partial(_require_whole, checkpoint)):
            print(f"{checkpoint}: whole")
    attempt.refuse()
    return 0


def _require_whole(folder: Path) -> bool:
    from megadpo.model.weights.convert import is_megatron_folder  # the same

    if not is_megatron_folder(folder):
        expected = "a run's checkpoint_dir, a checkpoint of it, or what megadpo import made"
        raise ConfigError(Problem(str(folder), "no checkpoint", expected, "correct the path"))
    if not verify(folder):
        raise ConfigError(Problem(str(folder), f"no {MANIFEST_FILE}", "a checkpoint with one", no_manifest(folder)))
    return True
