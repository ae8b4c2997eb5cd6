"""megadpo's side of benchmarks/gpu.py, one fresh process: `python gpu_worker.py RESULT.json CONFIG.yaml [key=value ...]`.

Runs `megadpo train` in this process, so that the allocator's peaks and the seconds of a reference pass made beforehand can be
read when it is over. Exit code: the command's, or 1 with the traceback on stderr; RESULT.json is written either way.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks.trl_worker import gpu_memory, peak_memory_bytes  # noqa: E402


def peaks_kept() -> Callable[[], dict[str, int]]:
    """From now on: what gpu_memory() would return if nobody reset the peaks. megadpo does, after every step."""
    import torch

    reset, peaks = torch.cuda.reset_peak_memory_stats, {}

    def kept() -> dict[str, int]:
        peaks.update({name: max(value, peaks.get(name, 0)) for name, value in gpu_memory().items()})
        return peaks

    def reset_noted(*given: Any) -> None:
        kept()
        reset(*given)

    torch.cuda.reset_peak_memory_stats = reset_noted
    return kept


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
    peaks = peaks_kept()
    try:
        code = megadpo(["train", *arguments])
    except Exception:
        traceback.print_exc()
        code = 1
    content = {"exit_code": code, "peak_bytes": peak_memory_bytes(), "precompute_s": beforehand_s, **peaks()}
    Path(result).write_text(json.dumps(content), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
