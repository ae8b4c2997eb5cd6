"""Evaluate: torchrun --nproc-per-node N launch/evaluate.py CONFIG.yaml [key=value ...]

Preference accuracy, margins and losses of policy.model_name (a Hugging Face folder, a hub name or a Megatron
checkpoint, in any layout) on every set of data.val_data_paths, against dpo.reference.model_name where it names one.
Writes <logger.log_dir>/evaluation.json and pairs-<name>.jsonl. Exit code 0: done; 2: refused.
"""

from __future__ import annotations

import sys

from torch.distributed.elastic.multiprocessing.errors import record

from megadpo.train.command import evaluate_main

if __name__ == "__main__":
    sys.exit(record(evaluate_main)(sys.argv[1:]))
