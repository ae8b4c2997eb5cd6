"""Damaged configs, rows and checkpoints: each is read, or refused in words, in time: python -m tests.fuzz [--seed 0]

Case N of a seed is always the same: --only rows --first N --count 1 repeats it. By default 1,000 configs, 1,000 rows and
300 checkpoints. Exit code 1 where a case fails: a traceback, damage that isn't seen, or more than half a minute.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# Before torch is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

COUNTS = {"configs": 1000, "rows": 1000, "checkpoints": 300}


def main(arguments: list[str] | None = None) -> int:
    from tests.fuzz.cases import CASES

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*CASES])
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, help=f"cases; the default is {COUNTS}")
    options = parser.parse_args(arguments)
    failures = 0
    print("| damaged | cases | read | refused | failed | s |", "|---|---|---|---|---|---|", sep="\n", flush=True)
    for name, make in CASES.items():
        if options.only not in (None, name):
            continue
        count = COUNTS[name] if options.count is None else options.count
        started, found = time.perf_counter(), Counter[str]()
        with tempfile.TemporaryDirectory(prefix="megadpo-fuzz-") as folder:
            case = make(Path(folder), options.seed)
            for number in range(options.first, options.first + count):
                kind, why = case(number)
                found[kind] += 1
                if kind == "failed":
                    print(f"{name} {number}: {why}", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - started
        row = [name, count, found["read"], found["refused"], found["failed"], f"{seconds:.0f}"]
        print(f"| {' | '.join(map(str, row))} |", flush=True)
        failures += found["failed"]
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
