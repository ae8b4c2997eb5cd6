"""Check that checkpoints are undamaged: megadpo verify results/dpo

Takes checkpoints, or a run's folder, which means all checkpoints in it. The checksum of every file is compared with
manifest.json. Exit code 0: undamaged; 2: refused, with every damaged file and every folder without a manifest on stderr.
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
    parser.add_argument(
        "folders", nargs="+", type=Path, help="a run's folder, its step_<N>, or megadpo import's output"
    )
    given = parser.parse_args(arguments).folders
    from megadpo.checkpoint.folder import step_folders  # imports torch: --help doesn't need it

    attempt = Attempts()
    for checkpoint in (one for folder in given for one in step_folders(folder) or [folder]):
        if attempt(partial(_require_whole, checkpoint)):
            print(f"{checkpoint}: whole")
    attempt.refuse()
    return 0


def _require_whole(folder: Path) -> bool:
    from megadpo.model.weights.convert import is_megatron_folder  # imports torch too

    if not is_megatron_folder(folder):
        expected = "a run's checkpoint_dir, a checkpoint of it, or the output of megadpo import"
        raise ConfigError(Problem(str(folder), "no checkpoint", expected, "correct the path"))
    if not verify(folder):
        raise ConfigError(Problem(str(folder), f"no {MANIFEST_FILE}", "a checkpoint with one", no_manifest(folder)))
    return True
