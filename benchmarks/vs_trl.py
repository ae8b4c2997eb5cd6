"""megadpo beside TRL's DPOTrainer on the same pairs, model and threads: pairs per second and peak memory on CPU, fp32.

    python benchmarks/vs_trl.py --trl-python TRL_VENV/bin/python                  # the comparison, 3 rounds
    python benchmarks/vs_trl.py --trl-python TRL_VENV/bin/python --sweep          # which of TRL's settings is fastest

Every run is a process of its own; the contenders take turns (A B A B ...) and the medians over the rounds count. Timed
are the steps after the warm-up, reference pass included, without start, loading, tokenising or compiling; memory is the
peak over the process's whole life. Exit code 0 whatever the ratio; 1 where a side fails or the losses differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import make_llama, sides  # noqa: E402
from benchmarks.trl_worker import Spec  # noqa: E402

GOALS = {"30m": (2.6, 0.65), "0.5b": (2.6, 0.8)}
"""By size: at least so many times the pairs per second of TRL's fastest setting, and at most that share of its memory."""
LOSS_TOLERANCE = 1e-4
QUIET_SHARE = 0.05
GIB = 2**30

_SORTED = {"sort_within_global_batch": True}
_COMPILED = {"extra": {"torch_compile": True}}
TRL_SETTINGS: dict[str, dict[str, Any]] = {
    # Fields of Spec by which a setting differs from its defaults; README.md says what came of each
    "mb1": {"micro_batch_pairs": 1},
    "mb2": {"micro_batch_pairs": 2},
    "mb4": {"micro_batch_pairs": 4},
    "mb8": {"micro_batch_pairs": 8},
    "mb16": {"micro_batch_pairs": 16},
    "mb2-sorted": {"micro_batch_pairs": 2, **_SORTED},
    "mb4-sorted": {"micro_batch_pairs": 4, **_SORTED},
    "mb8-sorted": {"micro_batch_pairs": 8, **_SORTED},
    "mb1-compile": {"micro_batch_pairs": 1, **_COMPILED},
    "mb2-sorted-compile": {"micro_batch_pairs": 2, **_SORTED, **_COMPILED},
    "mb1-eager": {"micro_batch_pairs": 1, "attention": "eager"},
    "mb1-flex": {"micro_batch_pairs": 1, "attention": "flex_attention"},
    "mb1-precompute": {"micro_batch_pairs": 1, "precompute_reference": True},
    "mb1-fused-adamw": {"micro_batch_pairs": 1, "extra": {"optim": "adamw_torch_fused"}},
    "mb1-checkpointing": {"micro_batch_pairs": 1, "extra": {"gradient_checkpointing": True}},
    "mb1-padding-free": {"micro_batch_pairs": 1, "extra": {"padding_free": True}},
    "mb1-liger": {"micro_batch_pairs": 1, "extra": {"use_liger_kernel": True}},
}
LAYOUTS = {
    "one": sides.Layout(),
    "one-1536": sides.Layout(pack_tokens=1536),
    "one-recompute": sides.Layout(recompute=True),
    "one-repeated": sides.Layout(share_prompt=False),
    "tp2": sides.Layout(tensor_parallel=2),
    "dp2": sides.Layout(data_parallel=2),
}


@dataclasses.dataclass(frozen=True)
class Timing:
    """One run's figures. Memory is summed over training processes; torchrun's own is not in it."""

    pairs_per_s: float
    peak_bytes: int
    launcher_bytes: int
    others_share: float
    """Part of the machine's CPU time that went to other work meanwhile; above QUIET_SHARE the speeds say nothing."""
    step_times_s: list[float]
    losses: list[float]

    @classmethod
    def of(cls, side: sides.Side, warmup_steps: int) -> Timing:
        timed = side.steps[warmup_steps:]
        pairs = sum(step["pairs"] for step in timed)
        # Ours by its own clock or by when its log lines came out, whichever is slower
        by_clock = sum(step["step_time_s"] for step in timed)
        by_arrival = sum(step.get("arrival_s", 0.0) for step in timed)
        seconds = max(by_clock, by_arrival) + _precompute_share(side, pairs)
        step_times = [step["step_time_s"] for step in side.steps]
        losses = [step["loss"] for step in side.steps]
        memory = sum(side.rank_peak_bytes)
        return cls(pairs / seconds, memory, side.launcher_peak_bytes, side.others_share, step_times, losses)


def _precompute_share(side: sides.Side, pairs: float) -> float:
    """Seconds that TRL spent on the timed pairs' reference log-probabilities before training."""
    all_pairs = sum(step["pairs"] for step in side.steps)
    return float(side.details.get("precompute_s", 0.0)) * pairs / all_pairs


Contender = tuple[str, Callable[[], sides.Side]]


def contenders(options: argparse.Namespace, spec: Spec) -> list[Contender]:
    """Name and run of everything that takes part, in the order in which they take turns."""
    longest = make_llama.longest(Path(spec.model), make_llama.read_pairs(Path(spec.data)))

    def theirs(setting: str) -> Callable[[], sides.Side]:
        return lambda: sides.run_trl(dataclasses.replace(spec, **TRL_SETTINGS[setting]), options.trl_python)

    def ours(layout: str) -> Callable[[], sides.Side]:
        return lambda: sides.run_ours(spec, LAYOUTS[layout], longest=longest, overrides=options.override)

    return [
        *((f"TRL {setting}", theirs(setting)) for setting in options.trl),
        *((f"megadpo {layout}", ours(layout)) for layout in options.layouts),
    ]


def run_rounds(
    taking_part: list[Contender], rounds: int, warmup_steps: int
) -> tuple[dict[str, list[Timing]], dict[str, str]]:
    """Everybody's timings by name, and the last line of those that failed (they take no further turn)."""
    timings: dict[str, list[Timing]] = {name: [] for name, _ in taking_part}
    failures: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for name, start in taking_part:
            if name in failures:
                continue
            try:
                timing = Timing.of(start(), warmup_steps)
            except sides.RunFailed as error:
                failures[name] = _reason(str(error))
                print(f"round {number}  {name:24} failed: {failures[name]}", flush=True)
                if name.startswith("megadpo"):
                    print(error, file=sys.stderr)
                continue
            timings[name].append(timing)
            print(
                f"round {number}  {name:24}{timing.pairs_per_s:8.2f} pairs/s {timing.peak_bytes / GIB:8.2f} GiB"
                f"   others' share of the CPU {timing.others_share:.0%}",
                flush=True,
            )
    return {name: found for name, found in timings.items() if found}, failures


def _reason(output: str) -> str:
    """The last line of an output that has words in it."""
    return next((line.strip() for line in reversed(output.splitlines()) if any(map(str.isalpha, line))), "")[:200]


def different_losses(timings: dict[str, list[Timing]]) -> list[str]:
    """The steps at which somebody's loss is not everybody's: then they did not do the same work."""
    (first, [reference, *_]), *_ = timings.items()
    found = []
    for name, runs in timings.items():
        for step, (a, b) in enumerate(zip(reference.losses, runs[0].losses, strict=True), start=1):
            if not abs(a - b) <= LOSS_TOLERANCE * max(abs(a), abs(b)):
                found.append(f"step {step}: {first} {a:.7f}, {name} {b:.7f}")
    return found


def table(timings: dict[str, list[Timing]], failures: dict[str, str]) -> list[str]:
    """Medians, and the spread over the rounds, as a Markdown table."""
    lines = ["| | pairs/s | lowest to highest | peak GiB | torchrun's own GiB |", "|---|---|---|---|---|"]
    for name, runs in timings.items():
        speeds = [run.pairs_per_s for run in runs]
        memory = median(run.peak_bytes for run in runs) / GIB
        launcher = median(run.launcher_bytes for run in runs) / GIB
        lines.append(
            f"| {name} | {median(speeds):.2f} | {min(speeds):.2f} to {max(speeds):.2f} | {memory:.2f} |"
            f" {f'{launcher:.2f}' if launcher else ''} |"
        )
    return lines + [f"| {name} | does not run: {reason} | | | |" for name, reason in failures.items()]


def goals(timings: dict[str, list[Timing]], size: str) -> list[dict[str, Any]]:
    """megadpo in one process against the fastest of TRL's settings that took part: speed, and that same run's memory."""
    ours = timings.get("megadpo one")
    theirs = {name: runs for name, runs in timings.items() if name.startswith("TRL")}
    if ours is None or not theirs or size not in GOALS:
        return []
    goal_speed, goal_memory = GOALS[size]

    def speed(runs: list[Timing]) -> float:
        return median(run.pairs_per_s for run in runs)

    def memory(runs: list[Timing]) -> float:
        return median(run.peak_bytes for run in runs)

    fastest = max(theirs, key=lambda name: speed(theirs[name]))
    faster, smaller = speed(ours) / speed(theirs[fastest]), memory(ours) / memory(theirs[fastest])
    return [
        {
            "what": "pairs/s",
            "against": fastest,
            "ratio": faster,
            "goal": f">= {goal_speed}",
            "met": faster >= goal_speed,
        },
        {
            "what": "peak memory",
            "against": fastest,
            "ratio": smaller,
            "goal": f"<= {goal_memory}",
            "met": smaller <= goal_memory,
        },
    ]


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    from importlib.metadata import version

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "status", "--short"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout else ""),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=sides.default_data(), help="JSONL of pairs (default: %(default)s)")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument("--trl", default="mb1,mb1-compile", help=f"TRL's settings, of {', '.join(TRL_SETTINGS)}")
    parser.add_argument("--layouts", default="one", help=f"ours, of {', '.join(LAYOUTS)}")
    parser.add_argument("--sweep", action="store_true", help="all of TRL's settings, none of ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--global-batch", type=int, default=16, help="pairs")
    parser.add_argument("--size", choices=sorted(make_llama.SIZES), default="30m")
    parser.add_argument("--threads", type=int, default=2, help="of each side, over all its processes")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for our config")
    parser.add_argument("--out", type=Path, help="JSON file for every round's figures")
    options = parser.parse_args(arguments)
    options.trl = list(TRL_SETTINGS) if options.sweep else [name for name in options.trl.split(",") if name]
    options.layouts = [] if options.sweep else [name for name in options.layouts.split(",") if name]
    unknown = sorted((set(options.trl) - set(TRL_SETTINGS)) | (set(options.layouts) - set(LAYOUTS)))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.data.exists():
        print(f"no such file: {options.data}; name one with --data, or its folder with MEGADPO_DATA", file=sys.stderr)
        return 2
    steps = options.warmup_steps + options.steps
    about = machine()
    print(f"{about['cpu']}, {options.threads} threads, fp32, {options.steps} steps of {options.global_batch} pairs")
    with tempfile.TemporaryDirectory(prefix="megadpo-vs-trl-") as folder:
        model, data = Path(folder) / "model", Path(folder) / "pairs.jsonl"
        rows = make_llama.read_pairs(options.data)
        count = make_llama.make(rows, model, make_llama.SIZES[options.size])
        print(f"Llama of {count:,} parameters", flush=True)
        used = rows[: steps * options.global_batch]
        data.write_text("".join(json.dumps(row) + "\n" for row in used), encoding="utf-8")
        spec = Spec(
            data=str(data),
            model=str(model),
            output_dir="",
            steps=steps,
            global_batch_pairs=options.global_batch,
            micro_batch_pairs=1,
            threads=options.threads,
        )
        timings, failures = run_rounds(contenders(options, spec), options.rounds, options.warmup_steps)
    if not timings:
        return 1
    different, reached = different_losses(timings), goals(timings, options.size)
    print("", *table(timings, failures), "", sep="\n")
    for goal in reached:
        verdict = "met" if goal["met"] else "not met"
        print(f"{goal['what']}: {goal['ratio']:.2f} of {goal['against']}'s; goal {goal['goal']}: {verdict}")
    busiest = max(run.others_share for runs in timings.values() for run in runs)
    if busiest > QUIET_SHARE:
        print(f"NOT A QUIET MACHINE: other work took up to {busiest:.0%} of the CPU; the speeds above say nothing")
    if different:
        print("NOT THE SAME WORK, the losses differ:", *different, sep="\n  ")
    if options.out:
        runs = {name: [dataclasses.asdict(run) for run in found] for name, found in timings.items()}
        content: dict[str, Any] = {
            "machine": about,
            "options": {k: str(v) for k, v in vars(options).items()},
            "runs": runs,
        }
        content |= {"failures": failures, "goals": reached, "different_losses": different}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failed_ours = any(name.startswith("megadpo") for name in failures)
    return 1 if different or failed_ours else 0


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    sys.exit(main())
