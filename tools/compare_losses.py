"""Compare two revisions bit for bit: train both with one config, and compare loss and gradient norm of every step.

    python tools/compare_losses.py main my-branch configs/demo_sft.yaml --nproc-per-node 2 dpo.max_num_steps=30
    python tools/compare_losses.py main . CONFIG.yaml [key=value ...]            # "." is the working tree as it stands

Each revision is checked out into a temporary worktree; paths of config, data and model are relative to the current folder.
Nothing is kept: checkpoints are off and the logs are temporary. Exit code 0: the same bits; 1: other bits, and the first
difference is printed; 2: a run failed or made no step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMPARED = ("train/loss", "train/grad_norm")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare the losses of two revisions bit for bit.")
    parser.add_argument("revision_a")
    parser.add_argument("revision_b")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="key=value, for both runs")
    parser.add_argument("--nproc-per-node", type=int, default=1)
    options = parser.parse_intermixed_args(arguments)
    runs = []
    with tempfile.TemporaryDirectory(prefix="compare-losses-") as folder:
        for name, revision in (("a", options.revision_a), ("b", options.revision_b)):
            print(f"--- {revision}", flush=True)
            try:
                with checked_out(revision, Path(folder) / name) as tree:
                    logs = Path(folder) / f"logs_{name}"
                    run(tree, options.config, options.overrides, options.nproc_per_node, logs)
            except subprocess.CalledProcessError as error:
                print(f"{revision}: exit code {error.returncode} from {' '.join(map(str, error.cmd))}", file=sys.stderr)
                return 2
            runs.append([json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()])
    difference = first_difference(*runs)
    if difference is None and not runs[0]:
        print("neither run made a step: nothing was compared", file=sys.stderr)
        return 2
    print(difference or f"the same bits in all {len(runs[0])} steps: {', '.join(COMPARED)}")
    return 0 if difference is None else 1


@contextlib.contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """A folder with the revision's files: a temporary worktree, or the working tree itself for "."."""
    top = subprocess.run(["git", "rev-parse", "--show-toplevel"], check=True, text=True, capture_output=True)
    if revision == ".":
        yield Path(top.stdout.strip())
        return
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=True)


def run(tree: Path, config: str, overrides: Sequence[str], nproc: int, logs: Path) -> None:
    """Train with the code of `tree`. Raises CalledProcessError if that fails."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # before the installed package, which is the main checkout
        "PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    one_node = ["-m", "torch.distributed.run", "--local-addr", "127.0.0.1", "--nproc-per-node", str(nproc)]
    torchrun = one_node if nproc > 1 else []
    ours = ["checkpointing.enabled=false", f"logger.log_dir={logs}"]
    command = [sys.executable, *torchrun, str(tree / "launch/train.py"), config, *overrides, *ours]
    subprocess.run(command, check=True, env=environment)


def first_difference(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> str | None:
    """A line about the first step in which a compared metric has other bits, or that only one run has; None if there is none."""
    for row_a, row_b in itertools.zip_longest(a, b):
        if row_a is None or row_b is None:
            return f"one run ends after {min(len(a), len(b))} steps, the other goes on to {max(len(a), len(b))}"
        for name in ("step", *COMPARED):
            value_a, value_b = row_a.get(name), row_b.get(name)
            if bits(value_a) != bits(value_b):
                return f"step {row_a['step']}: {name} {value_a!r} ({bits(value_a)}) and {value_b!r} ({bits(value_b)})"
    return None


def bits(value: float | None) -> str:
    """A float in hexadecimal, which shows every bit. JSON's decimal form is read back to the same bits."""
    return "absent" if value is None else float(value).hex()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
