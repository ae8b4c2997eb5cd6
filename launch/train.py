"""Train: torchrun --nproc-per-node N launch/train.py CONFIG.yaml [key=value ...]

The same as `megadpo train`. Options: python launch/train.py --help. Exit codes: docs/running.md.
"""

from __future__ import annotations

import sys

from megadpo.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
