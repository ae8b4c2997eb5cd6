"""Runs in a process of its own: how much memory loading, importing or exporting takes, in bytes.

`python -m tests.model.weights.memory_worker load|import|export SOURCE TARGET`
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megadpo.config.architecture import read_architecture
from megadpo.model.weights import export_hf, import_hf, load_hf_weights
from megadpo.model.weights.tables import weight_table
from tests.model.weights.stub import Stub


def memory_bytes(field: str) -> int:
    """VmHWM (the peak) or VmRSS (now): anonymous memory and mapped pages of files, as the kernel counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(action: str, source: str, target: str) -> None:
    tp_size = 4
    model = torch.nn.Module()
    if action == "load":
        table = weight_table(read_architecture(source))
        # ones, not empty: the shard's own memory is taken before the measurement.
        model = Stub({entry.names[0]: torch.ones(entry.local_shape(tp_size)) for entry in table.entries})
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak starts again from here
    before = memory_bytes("VmRSS")
    if action == "load":
        load_hf_weights([model], read_architecture(source), source, tp_rank=0, tp_size=tp_size)
    elif action == "import":
        import_hf(source, target)
    else:
        export_hf(source, target)
    print(memory_bytes("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
