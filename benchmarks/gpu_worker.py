"""megadpo's side of benchmarks/gpu.py, one fresh process: `python gpu_worker.py RESULT.json CONFIG.yaml [key=value ...]`.

Runs launch/train.py's command in this process, so that the allocator's peaks can be read when it is over. Exit code: the
command's, or 1 with the traceback on stderr; RESULT.json is written either way.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks.trl_worker import gpu_memory, peak_memory_bytes  # noqa: E402


def main() -> int:
    from megadpo.commands import main as megadpo

    result, *arguments = sys.argv[1:]
    try:
        code = megadpo(["train", *arguments])
    except Exception:
        traceback.print_exc()
        code = 1
    content = {"exit_code": code, "peak_bytes": peak_memory_bytes(), **gpu_memory()}
    Path(result).write_text(json.dumps(content), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
