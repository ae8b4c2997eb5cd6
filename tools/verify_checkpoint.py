"""Whether checkpoints are as they were written: python tools/verify_checkpoint.py results/dpo/step_*

Every byte of every file is held against manifest.json. Exit code 0: whole; 2: every damaged file on stderr, and folders
without a manifest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadpo.config.problems import ConfigError, Problem, UserError
from megadpo.model.manifest import MANIFEST_FILE, no_manifest, verify
from megadpo.train.command import refuse


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Hold checkpoint folders against their manifests.")
    parser.add_argument("folders", nargs="+", type=Path, help="step_<N> of a run, or what tools/hf_to_megatron.py made")
    problems: list[Problem] = []
    for folder in parser.parse_args(arguments).folders:
        try:
            if not verify(folder):
                raise ConfigError(
                    Problem(str(folder), f"no {MANIFEST_FILE}", "a checkpoint with one", no_manifest(folder))
                )
            print(f"{folder}: whole")
        except UserError as error:
            problems += error.problems
    return refuse(ConfigError(problems)) if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
