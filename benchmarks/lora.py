"""Memory and time of LoRA against training all weights beside a resident reference, on a CPU; exit code 1 above half.

    python benchmarks/lora.py --data hh_train.jsonl --out benchmarks/results/lora_cpu.json

113M parameters, the same pairs in the same order, each side in a process of its own, in turns. The peak is VmHWM: weights,
gradients, optimizer, activations, and the interpreter with its libraries (`--no-run` prints what the planner expects of
the tensors, and runs nothing). Clocks on a busy machine say little: `others_share` is what went to other work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import make_llama, sides, vs_trl  # noqa: E402
from benchmarks.trl_worker import Spec  # noqa: E402

GOAL = 0.5
"""Peak of LoRA over the peak of training all weights, at most."""
CONTENDERS = {
    "all weights, resident reference": [],
    "LoRA, adapter_off": ["policy.megatron_cfg.peft={enabled: true, dim: 16, target_modules: [all-linear]}"],
}


def planned_bytes(spec: Spec, longest: tuple[int, int], overrides: list[str], folder: Path) -> int:
    """Tensors at their peak, by `megadpo plan`."""
    config = folder / "plan.yaml"
    config.write_text(json.dumps(sides.our_config(spec, sides.Layout(), folder / "logs", longest)), encoding="utf-8")
    command = [sys.executable, "-m", "megadpo", "plan", str(config), "--world-size", "1", "--json", *overrides]
    env = sides.environment(spec.threads)
    done = subprocess.run(command, cwd=REPOSITORY, env=env, text=True, capture_output=True, check=True)
    (stage,) = json.loads(done.stdout)["stages"]
    return int(stage["peak_bytes"])


def run_case(precision: str, options: argparse.Namespace, spec: Spec, longest: tuple[int, int]) -> dict[str, Any]:
    """Plan and rounds of both sides, and the ratio of their peaks."""
    found: dict[str, Any] = {"precision": precision, "planned_bytes": {}, "runs": {name: [] for name in CONTENDERS}}
    wanted = {name: [f"policy.precision={precision}", *overrides] for name, overrides in CONTENDERS.items()}
    for name, overrides in wanted.items():
        with tempfile.TemporaryDirectory(prefix="megadpo-lora-plan-") as folder:
            planned = planned_bytes(spec, longest, overrides, Path(folder))
        found["planned_bytes"][name] = planned
        print(f"{precision}, {name}: {planned / 2**20:,.0f} MiB of tensors planned", flush=True)
    for _ in range(0 if options.no_run else options.rounds):
        for name, overrides in wanted.items():
            side = sides.run_ours(spec, sides.Layout(), longest=longest, overrides=overrides)
            seconds = median(step["step_time_s"] for step in side.steps[1:])
            peak = side.rank_peak_bytes[0]
            run = {"peak_bytes": peak, "step_s": seconds, "others_share": side.others_share, "steps": side.steps}
            found["runs"][name].append(run)
            print(f"{precision}, {name}: {peak / 2**20:,.0f} MiB, {seconds:.2f} s a step", flush=True)
    if not options.no_run:
        full, lora = (median(run["peak_bytes"] for run in runs) for runs in found["runs"].values())
        found["ratio"] = lora / full
        said = "met" if found["ratio"] <= GOAL else "not met"
        print(f"{precision}: LoRA's peak is {found['ratio']:.3f} of it; goal <= {GOAL}: {said}", flush=True)
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=sides.default_data(), help="JSONL of pairs (default: %(default)s)")
    parser.add_argument("--size", choices=sorted(make_llama.SIZES), default="110m")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=4, help="a global batch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-run", action="store_true", help="only plan")
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.data.exists():
        print(f"no such file: {options.data}; name one with --data, or its folder with MEGADPO_DATA", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="megadpo-lora-") as folder:
        model = Path(folder) / "model"
        count = make_llama.make(make_llama.read_pairs(options.data), model, make_llama.SIZES[options.size])
        rows = make_llama.read_pairs(options.data, options.steps * options.pairs)
        data = Path(folder) / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec = Spec(
            data=str(data), model=str(model), output_dir="", steps=options.steps,
            global_batch_pairs=options.pairs, micro_batch_pairs=1, threads=options.threads,
        )  # fmt: skip
        longest = make_llama.longest(model, rows)
        print(f"{count:,} parameters, packs of {longest[1]} tokens", flush=True)
        about = {"machine": vs_trl.machine(), "parameters": count, "pack_tokens": longest[1], "data": options.data.name}
        about |= {name: value for name, value in vars(options).items() if name not in ("data", "out", "no_run")}
        cases = []
        for precision in options.precisions.split(","):
            cases.append(run_case(precision, options, spec, longest))
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps({**about, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    return 1 if any(case.get("ratio", 0.0) > GOAL for case in cases) else 0


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    sys.exit(main())
