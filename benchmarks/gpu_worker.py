"""megadpo's side of benchmarks/gpu.py, one fresh process: `python gpu_worker.py RESULT.json CONFIG.yaml [key=value ...]`.

Runs launch/train.py's command in this process, so that the allocator's peaks can be read when it is over, and the seconds of
a reference pass made beforehand. Exit code: the command's, or 1 with the traceback on stderr; RESULT.json is written either
way.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks.trl_worker import gpu_memory, peak_memory_bytes  # noqa: E402


def main() -> int:
    from megadpo.commands import main as megadpo
    from megadpo.train import reference

    result, *arguments = sys.argv[1:]
    compute, beforehand_s = reference.compute_missing, 0.0

    def timed(*given: Any, **options: Any) -> Any:
        nonlocal beforehand_s
        started = time.perf_counter()
        found = compute(*given, **options)  # log-probabilities on the host
        beforehand_s += time.perf_counter() - started
        return found

    reference.compute_missing = timed
    try:
        code = megadpo(["train", *arguments])
    except Exception:
        traceback.print_exc()
        code = 1
    content = {"exit_code": code, "peak_bytes": peak_memory_bytes(), "precompute_s": beforehand_s, **gpu_memory()}
    Path(result).write_text(json.dumps(content), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
