"""What it costs to hold a checkpoint of a gigabyte against its checksums, beside loading it.

    python benchmarks/verify_load.py [--rounds 5] [--out result.json]

Each round is two resumes of a run by a process of its own, one thread for the load and as many as there are cores for the
checksums: one with the files in memory, one after they were dropped from it. A resume verifies every byte before it builds
the model, then loads weights and optimizer. Timed are megadpo/train/resume.py's `damages_together` and
megadpo/train/setup.py's `load_training_state`, by the clock and by the processor.

Predicted before the first run, for 1.06 GB on two quiet cores: 0.2 s of 2.5 s from memory (8%: the bytes are copied and
hashed once more; goal: under 5%); from disk the verification waits for it, and the load then finds the files in memory, so
that both together take as long as the load alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import sides  # noqa: E402
from benchmarks.scaling import Case, make_model, write_pairs  # noqa: E402
from benchmarks.trl_worker import Spec  # noqa: E402
from benchmarks.vs_trl import machine  # noqa: E402

MOST = 0.05
TIMED = {"verify": ("megadpo.train.resume", "damages_together"), "load": ("megadpo.train.setup", "load_training_state")}


class Loaded(BaseException):
    """The resume has come to where it would train."""


def resume_timed(arguments: list[str]) -> dict[str, float]:
    """`megadpo train` up to its loaded state: seconds by the clock and by the processor, all threads together."""
    from megadpo.commands import main as command

    importlib.import_module("megadpo.train.command")
    found: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock, processor = time.perf_counter(), time.process_time()
            result = function(*args, **kwargs)
            found[f"{name}_s"] = time.perf_counter() - clock
            found[f"{name}_cpu_s"] = time.process_time() - processor
            if name == "load":
                raise Loaded
            return result

        return call

    for name, (module, function) in TIMED.items():
        owner = importlib.import_module(module)
        setattr(owner, function, timed(name, getattr(owner, function)))
    try:
        command(["train", *arguments])
    except Loaded:
        return found
    raise RuntimeError("nothing was resumed")


def forget(folder: Path) -> None:
    """Drop the files from the kernel's memory."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--resume", *arguments]
    done = subprocess.run(command, env=sides.environment(1), capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(runs: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = ["| files | verify | load | share | verify, CPU | load, CPU | share |", "|---|---|---|---|---|---|---|"]
    for where, found in runs.items():
        cells = []
        for unit in ("s", "cpu_s"):
            verify, load = (median(one[f"{name}_{unit}"] for one in found) for name in ("verify", "load"))
            cells += [f"{verify:.2f} s", f"{load:.2f} s", f"{verify / load:.1%}"]
        lines.append(f"| {where} | {' | '.join(cells)} |")
    share = median(one["verify_s"] / one["load_s"] for one in runs["in memory"])
    return [*lines, f"goal, under {MOST:.0%} of a load from memory: {'met' if share < MOST else 'NOT MET'}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", default="90m", help="of benchmarks/make_llama.py")
    parser.add_argument("--out", type=Path, help="JSON file for every run's figures")
    options = parser.parse_args(arguments)
    about = machine()
    with tempfile.TemporaryDirectory(prefix="megadpo-verify-") as name:
        folder = Path(name)
        make_model(folder / "model", options.size)
        pairs = write_pairs(Case(series="", value="", pairs=2), folder / "model", folder / "pairs.jsonl", steps=2)
        data, model = str(pairs.path), str(folder / "model")
        spec = Spec(
            data=data, model=model, output_dir="", steps=1, global_batch_pairs=2, micro_batch_pairs=1, threads=1
        )
        checkpoints = folder / "checkpoints"
        saving = ["checkpointing.enabled=true", f"checkpointing.checkpoint_dir={checkpoints}"]
        layout = sides.Layout(pack_tokens=max(1536, pairs.longest[1]))
        sides.run_ours(spec, layout, longest=pairs.longest, overrides=saving, keep=folder / "run")
        size = sum(file.stat().st_size for file in (checkpoints / "step_1").rglob("*") if file.is_file())
        resumed = [str(folder / "run" / "config.yaml"), *saving, "dpo.max_num_steps=2"]
        runs: dict[str, list[dict[str, float]]] = {"in memory": [], "on disk": []}
        for number in range(1, options.rounds + 1):
            for where, found in runs.items():
                if where == "on disk":
                    forget(checkpoints)
                found.append(run(resumed))
                print(f"round {number}, {where}: {found[-1]}", flush=True)
    print(f"{about['cpu']}, {size / 1e9:.2f} GB", *report(runs), sep="\n")
    if options.out:
        found_all = {"machine": about, "checkpoint_bytes": size, "runs": runs}
        options.out.write_text(json.dumps(found_all, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    if sys.argv[1:2] == ["--resume"]:
        print(json.dumps(resume_timed(sys.argv[2:])))
        sys.exit()
    sys.exit(main())
