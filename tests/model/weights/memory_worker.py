"""Runs in a process of its own: how much memory loading, importing or exporting takes, in bytes.

`python -m tests.model.weights.memory_worker HF_FOLDER WORK_FOLDER` prints the peaks as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import megatron.core.dist_checkpointing  # noqa: F401  else its 55 MB would count as the import's
import torch

from megadpo.config.grid import Grid
from megadpo.families import read_architecture, weight_table
from megadpo.model.weights import export_hf, import_hf, load_hf_weights
from tests.model.weights.stub import Stub

TP_SIZE = 4


def memory_bytes(field: str) -> int:
    """VmHWM (the peak) or VmRSS (now): anonymous memory and mapped pages of files, as the kernel counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_bytes(action: Callable[..., None], *arguments: object, **options: object) -> int:
    """Of the call, over what the process held before it."""
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak starts again from here
    before = memory_bytes("VmRSS")
    action(*arguments, **options)
    return memory_bytes("VmHWM") - before


def main(hf: str, work: str) -> None:
    arch = read_architecture(hf)
    # ones, not empty: the shard's own memory is taken before the measurement.
    model = Stub({e.names[0]: torch.ones(e.local_shape(TP_SIZE)) for e in weight_table(arch).entries})
    peaks = {"load": peak_bytes(load_hf_weights, [model], arch, hf, Grid(tensor=TP_SIZE))}
    peaks["import"] = peak_bytes(import_hf, hf, f"{work}/megatron")
    peaks["export"] = peak_bytes(export_hf, f"{work}/megatron", f"{work}/hf")
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(*sys.argv[1:])
