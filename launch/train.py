"""Train: torchrun --nproc-per-node N launch/train.py CONFIG.yaml [key=value ...]

The same command on CPUs and GPUs, alone (python launch/train.py ...) or under torchrun. A run started again with the
same checkpointing.checkpoint_dir goes on where it stopped.

    python launch/train.py CONFIG.yaml --check [--world-size N] [key=value ...]

checks config, model folder, layout and data, touching no weights and no GPU. Exit code 0: good; 2: refused, with
every problem on stderr. The exit codes of a run: docs/running.md.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from megadpo.train.command import main

if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
