"""Kill runs in every phase, start them again, and compare: python -m tests.crash [--kills 200] [--seed 0]

The same seed draws the same kills. --first 40 --kills 40 does the kills from number 40 on; --out FILE adds the counts to
those that the file has, so that a long test can be made in pieces. Exit code 1 where something differs or is left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Before torch is imported anywhere
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(arguments: list[str] | None = None) -> int:
    from tests.crash.stories import Count, World, crash, kills_in_turn

    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file that the counts are added to")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="megadpo-crash-") as folder:
        plan = [*kills_in_turn(options.seed, options.first, options.kills)]
        count = crash(World(Path(folder)), plan, options.seed, lambda line: print(line, flush=True))
    if options.out is not None:
        before = Count()
        if options.out.exists():
            known = json.loads(options.out.read_text())
            before = Count(**{**known, "kills": Counter(known["kills"])})
        count = before + count
        options.out.write_text(json.dumps(vars(count), indent=1) + "\n")
    print(*count.table(), sep="\n")
    return 0 if count.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
