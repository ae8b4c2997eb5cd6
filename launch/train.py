"""Train: torchrun --nproc-per-node N launch/train.py CONFIG.yaml [key=value ...]

The same as `megadpo train`, which has all that it can do: python launch/train.py --help. The exit codes of a run:
docs/running.md.
"""

from __future__ import annotations

import sys

from megadpo.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
