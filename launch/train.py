"""Train: torchrun --nproc-per-node N launch/train.py CONFIG.yaml [key=value ...]

`megadpo train` under torchrun, which ends otherwise than `megadpo train --nproc-per-node N`: docs/running.md.
"""

from __future__ import annotations

import sys

from megadpo.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
