"""The plan against what the operating system says:

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 python -m tests.plan.resident

Prints how far the resident set of one process grew over two steps of a 31.6M-parameter float32 model, beside the plan.
Not a test: the resident set holds what allocators keep (the two variables make glibc give most of it back).
"""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

import torch

from megadpo.data.batches.loader import GlobalBatch
from megadpo.plan.packs import all_pairs, full_pack
from megadpo.plan.trace import empty_pack
from tests.plan import measured
from tests.plan.cases import LLAMA_30M, write_case
from tests.plan.test_measured import plan_of

MIB = 2**20


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_case(Path(folder) / "case", LLAMA_30M, sequence_packing={"train_mb_tokens": 2048})
        overrides = ["policy.precision=float32"]
        plan = plan_of(path, overrides, 1, (312, 100, 100))
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        cfg, _, trainer = measured.build(path, overrides)
    packs = [empty_pack(cfg, full_pack(cfg, all_pairs((312, 100, 100), 1))) for _ in range(2)]
    batch = GlobalBatch(micro_batches=packs, num_pairs=8, num_tokens=0, pair_indices=list(range(8)))
    for _ in range(2):
        trainer.step(batch)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f"planned {plan.peak_bytes / MIB:.0f} MiB, resident set grew by {grown / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
