"""megadpo beside TRL's DPOTrainer on one GPU, and beside itself: pairs/s, tokens/s, MFU, peak memory.

    python benchmarks/gpu.py --model llama-3.1-8b --lengths ultrafeedback --out result.json
    python benchmarks/gpu.py --model llama-3.2-1b --lengths hh --data hh_train.jsonl \\
        --ours ours,ours-unshared --out result.json
    python benchmarks/gpu.py --model llama-3.1-8b --ours ours,ours-fp8 --trl '' --out result.json
    python benchmarks/gpu.py --smoke            # a tiny model on whatever there is, in under a minute

Every run is a fresh process; the contenders take turns until --rounds or --minutes are up; the JSON is rewritten after
every run. Timed are the steps after the warm-up, reference pass included. What the figures mean: benchmarks/README.md.
A call with the same
--out and settings goes on where the one before stopped. Exit code 0 whatever the ratios; 1 where one of ours fails; 2
without a GPU (but for --smoke); 3 where the time did not suffice for everybody once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import gpu_inputs, gpu_machine, gpu_report, gpu_trl, gpu_work, sides  # noqa: E402
from benchmarks.gpu_contenders import FLOAT8, OURS, absent, nothing_to_compare  # noqa: E402
from benchmarks.gpu_options import parse  # noqa: E402
from benchmarks.gpu_sides import (  # noqa: E402
    OUT_OF_MEMORY,
    TIMED_OUT,
    OurSettings,
    Outcome,
    our_config,
    run_float64,
    run_ours,
    run_trl,
)
from benchmarks.trl_worker import Spec  # noqa: E402
from megadpo.families import read_architecture  # noqa: E402

MARGIN_S = 15.0
"""Kept back at the end of --minutes: to write, and to clean up."""
LEAST_S = 5.0
"""No run is shorter."""
UNFINISHED = 3
"""Exit code: the time did not suffice for everybody once; a call with the same --out goes on."""
ASIDE_S = 60.0
"""For making the model, however little is left, and at most for `megadpo plan`, after the runs."""
FLOAT8_TOLERANCE = 1e-2
"""Of float8's losses against `ours`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is run, beside who runs it."""

    options: argparse.Namespace
    machine: dict[str, Any]
    device: str
    shape: gpu_inputs.Shape
    lean: bool
    lengths: gpu_inputs.Lengths
    spec: Spec
    deadline: float
    """By time.monotonic()."""

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def run_limit_s(self) -> float:
        return min(self.left_s(), 60 * self.options.run_minutes)

    def settings(self, name: str) -> OurSettings:
        """Of one of OURS: packs of --pack-tokens, or the longest pair where that is more."""
        share = OURS[name].get("share_prompt", True)
        prompts, answers = self.lengths[:, 0], self.lengths[:, 1:].sum(axis=1)
        longest_pair = int(((1 if share else 2) * prompts + answers).max())
        longest = int((prompts + self.lengths[:, 1:].max(axis=1)).max())
        overrides = (*OURS[name].get("overrides", ()), *self.options.override)
        return OurSettings(
            pack_tokens=max(OURS[name].get("pack_tokens", self.options.pack_tokens), longest_pair),
            longest_tokens=longest,
            share_prompt=share,
            lean=OURS[name].get("lean", self.lean),
            overrides=overrides,
        )


def prepare(
    options: argparse.Namespace, folder: Path, machine: dict[str, Any], deadline: float, *, float8: bool
) -> Job:
    """Choose layers and optimizer for this GPU's memory, make model and pairs in `folder`. float8: somebody computes in
    it, and keeps float8 copies of the weights beside them; all have as many layers."""
    device = "cuda" if "gpu" in machine else "cpu"
    whole = gpu_inputs.SHAPES[options.model]
    memory = machine.get("gpu_memory_bytes", 1 << 40)
    lean = options.optimizer == "lean"
    fused = machine["versions"]["transformer-engine"] is not None
    spare = 0.18 if fused else 0.30  # torch's own AdamW makes lists as large as the weights
    if options.optimizer == "auto":
        fits = gpu_report.whole_layers(whole, memory, lean=False, float8=float8, spare=spare) == whole.num_layers
        lean = not fits and fused
    layers = options.layers or gpu_report.whole_layers(whole, memory, lean=lean, float8=float8, spare=spare)
    shape = dataclasses.replace(whole, num_layers=layers)
    steps = options.warmup_steps + options.steps
    count = steps * options.global_batch
    if options.lengths == "hh":
        lengths = gpu_inputs.hh_lengths(options.data, count)
    else:
        lengths = gpu_inputs.ultrafeedback_lengths(count, scale=0.05 if options.smoke else 1.0)
    gpu_inputs.write_pairs(lengths, shape.vocab_size, folder / "pairs.jsonl")
    making = multiprocessing.get_context("spawn").Process(
        target=gpu_inputs.make_model, args=(shape, folder / "model", torch.device(device))
    )
    making.start()
    making.join(max(ASIDE_S, deadline - time.monotonic()))
    if making.exitcode is None:
        making.kill()
        making.join()
    if making.exitcode != 0:
        raise RuntimeError(f"making the model ended with code {making.exitcode}, or not within --minutes")
    spec = Spec(
        data=str(folder / "pairs.jsonl"),
        model=str(folder / "model"),
        output_dir="",
        steps=steps,
        global_batch_pairs=options.global_batch,
        micro_batch_pairs=1,
        threads=1 if device == "cpu" else min(8, os.cpu_count() or 1),
        device=device,
        beta=0.1,
        learning_rate=1e-6,
    )
    return Job(
        options=options,
        machine=machine,
        device=device,
        shape=shape,
        lean=lean,
        lengths=lengths,
        spec=spec,
        deadline=deadline,
    )


def contenders(job: Job) -> list[tuple[str, Callable[[], Outcome]]]:
    """In the order in which they take turns."""

    def ours(name: str) -> Callable[[], Outcome]:
        return lambda: run_ours(name, job.spec, job.settings(name), job.run_limit_s())

    def theirs(name: str) -> Callable[[], Outcome]:
        spec = dataclasses.replace(job.spec, **gpu_trl.settings(name))
        return lambda: run_trl(name, spec, job.options.trl_python, job.run_limit_s())

    return [*((n, ours(n)) for n in job.options.ours), *((n, theirs(n)) for n in job.options.trl)]


def run_rounds(
    job: Job,
    outcomes: dict[str, list[Outcome]],
    failed: dict[str, str],
    left_out: dict[str, str],
    write: Callable[[], None],
) -> None:
    """Until the rounds are done or the time is up. `outcomes` holds what was run before, if anything was, and gains every
    run; `failed` gains whoever fails; they take no further turn. `left_out` gains whoever the time did not suffice for
    even once. write: called after every run."""
    failed |= {name: OUT_OF_MEMORY for name, runs in outcomes.items() if any(run.error for run in runs)}
    for number in range(1, job.options.rounds + 1):
        for name, start in contenders(job):
            if name in failed or len(outcomes.get(name, [])) >= number:
                continue
            needed, left = seconds_needed(name, outcomes), job.left_s()
            ran = bool(outcomes.get(name))
            if left < needed:
                print(f"round {number}  {name:36} not started: {left:.0f} s are left, {needed:.0f} needed", flush=True)
                if not ran:
                    left_out[name] = f"not started: {left:.0f} s were left, {needed:.0f} needed"
                    write()
                continue
            outcome = start()
            outcomes.setdefault(name, []).append(outcome)
            if outcome.error is None:
                left_out.pop(name, None)
                speed = outcome.pairs_per_s(job.options.warmup_steps, job.options.global_batch) or 0.0
                memory = (outcome.peak_allocated_bytes or 0) / gpu_report.GIB
                text = f"{speed:8.2f} pairs/s {memory:8.2f} GiB  process {outcome.seconds:5.0f} s"
                print(f"round {number}  {name:36} {text}", flush=True)
            elif outcome.error == TIMED_OUT and left < 60 * job.options.run_minutes:
                print(f"round {number}  {name:36} stopped: the time was up", flush=True)
                if not ran:
                    left_out[name] = f"stopped after {outcome.seconds:.0f} s: the time was up"
            else:
                failed[name] = outcome.error
                print(f"round {number}  {name:36} {outcome.error}", flush=True)
                if name.startswith("ours"):
                    print(outcome.log, file=sys.stderr)
            write()


def seconds_needed(name: str, outcomes: Mapping[str, list[Outcome]]) -> float:
    """For a run of `name`: a tenth more than its own longest, or what the shortest of the others took."""
    took = {other: [one.seconds for one in runs if one.error is None] for other, runs in outcomes.items()}
    if took.get(name):
        return 1.1 * max(took[name])
    return min((seconds for runs in took.values() for seconds in runs), default=LEAST_S)


def conclusions(
    job: Job, outcomes: dict[str, list[Outcome]], failed: dict[str, str], left_out: dict[str, str]
) -> dict[str, Any]:
    """Everything for the JSON file."""
    arch = read_architecture(Path(job.spec.model))
    warmup, pairs = job.options.warmup_steps, job.options.global_batch
    found = []
    for name, runs in outcomes.items():
        share = name.startswith("ours") and job.settings(name).share_prompt
        timed = job.lengths[warmup * pairs :]
        one = gpu_report.measured(runs, arch, timed, warmup_steps=warmup, pairs_per_step=pairs, share_prompt=share)
        found += [one] if one is not None else []
    rate = job.machine["matrix_rate_tflops"]
    return {
        "machine": job.machine,
        "command": sys.argv,
        "options": {key: str(value) for key, value in vars(job.options).items()},
        "model": dataclasses.asdict(job.shape) | {"parameters": job.shape.parameters, "name": job.options.model},
        "layers_left_out": gpu_inputs.SHAPES[job.options.model].num_layers - job.shape.num_layers,
        "lengths": gpu_report.summary_of(job.lengths),
        "spec": dataclasses.asdict(job.spec),
        "our_config": our_config(job.spec, job.settings(job.options.ours[0] if job.options.ours else "ours"), Path()),
        "contender_settings": settings_of(job),
        "state_bytes": gpu_report.state_bytes(job.shape, lean=job.lean),
        "measured": [dataclasses.asdict(one) for one in found],
        "failed": failed,
        "left_out": left_out,
        "float8": gpu_report.float8_beside(found, _losses(outcomes), FLOAT8, FLOAT8_TOLERANCE),
        "goals": gpu_report.goals(found, rate),
        "first_steps": gpu_work.first_steps(outcomes),
        "different_work": different_work(job, outcomes),
        "table": gpu_report.table(
            found, failed | left_out, rate, gpu_machine.datasheet_tflops(job.machine.get("gpu", ""))
        ),
        "runs": {name: [dataclasses.asdict(one) for one in runs] for name, runs in outcomes.items()},
    }


def _losses(outcomes: Mapping[str, list[Outcome]]) -> dict[str, list[float]]:
    """By step, of everybody's first run that came to its end."""
    whole = {name: next((run for run in runs if run.error is None), None) for name, runs in outcomes.items()}
    return {name: run.losses for name, run in whole.items() if run is not None}


def settings_of(job: Job) -> dict[str, Any]:
    """Of every contender, with the peak foretold for TRL's."""
    trl = [name for name in job.options.trl if name not in ("auto", "quick")]
    pairs = job.options.global_batch
    found = {name: gpu_trl.settings(name) for name in trl}
    return {name: OURS[name] for name in job.options.ours} | {
        name: one | {"peak_bytes_foretold": gpu_trl.peak_bytes(job.shape, one, job.lengths, pairs)}
        for name, one in found.items()
    }


def different_work(job: Job, outcomes: Mapping[str, list[Outcome]]) -> list[str]:
    """Where somebody computed something else than the first one, in words."""
    steps, first_batch = gpu_work.first_steps(outcomes), job.lengths[: job.options.global_batch]
    found = gpu_work.different_first_steps(steps, first_batch)
    timed = {name: values for name, values in _losses(outcomes).items() if values}
    return found + gpu_work.different_losses(timed, job.device)


def held_to_float64(job: Job, outcomes: dict[str, list[Outcome]], failed: dict[str, str]) -> None:
    """Adds the outcome `float64` if it isn't there, or says in `failed` why not."""
    memory = job.machine.get("gpu_memory_bytes", 1 << 40)
    if "float64" in outcomes or job.left_s() < LEAST_S:
        return
    if 20 * job.shape.parameters > memory:
        failed["float64"] = "weights and gradients in float64 don't fit; name fewer --layers"
        return
    outcome = run_float64(job.spec, job.run_limit_s())
    if outcome.error is None:
        outcomes["float64"] = [outcome]
    else:
        failed["float64"] = f"{outcome.error}: {outcome.log[-300:]}"
    print(f"float64: {outcome.first_step or outcome.error}", flush=True)


def plan_of(job: Job) -> dict[str, Any] | None:
    """The memory that `megadpo plan` foretells for the first of ours, where it knows this GPU and time is left."""
    gpu = next((name for name in ("h100", "h200", "a100", "b200") if name.upper() in job.machine.get("gpu", "")), None)
    if gpu is None or not job.options.ours or job.left_s() < LEAST_S:
        return None
    name = job.options.ours[0]
    config = Path(job.spec.data).with_name("plan.yaml")
    config.write_text(json.dumps(our_config(job.spec, job.settings(name), config.parent / "logs")), encoding="utf-8")
    command = [sys.executable, "-m", "megadpo", "plan", str(config), *job.settings(name).overrides]
    command += ["--world-size", "1", "--gpu", gpu, "--json"]
    env, timeout_s = sides.environment(1, {"CUDA_VISIBLE_DEVICES": ""}), min(ASIDE_S, job.left_s())
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout_s, check=False)
        return dict(json.loads(done.stdout))
    except (json.JSONDecodeError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments, __doc__.splitlines()[0])
    deadline = time.monotonic() + 60 * options.minutes - MARGIN_S
    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA device: nothing to measure; --smoke runs a tiny model on the CPU", file=sys.stderr)
        return 2
    # In a process of its own: what it takes of the GPU is gone with it
    asked = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_machine"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    machine = json.loads(asked.stdout)
    missing = absent(options, machine)
    if nothing_to_compare(options, missing):
        print("nothing is measured:", *(f"{name}: {reason}" for name, reason in missing.items()), sep="\n  ")
        save(options.out, {"machine": machine, "command": sys.argv, "measured": [], "failed": missing})
        return 0
    failed: dict[str, str] = dict(missing)
    left_out: dict[str, str] = {}
    float8 = any(name in FLOAT8 and name not in missing for name in options.ours)
    folder = gpu_inputs.work_folder(2 * gpu_inputs.SHAPES[options.model].parameters)
    try:
        job = prepare(options, folder, machine, deadline, float8=float8)
        if not set(options.trl) & missing.keys():
            options.trl, unfit = choose_trl(job)
            failed |= unfit
        describe(job)
        asked = {key: str(value) for key, value in vars(options).items()}
        outcomes = gpu_work.continued(options.out, asked, machine)

        def write() -> None:
            save(options.out, conclusions(job, outcomes, failed, left_out))

        write()
        run_rounds(job, outcomes, failed, left_out, write)
        if options.float64:
            held_to_float64(job, outcomes, failed)
        plan = plan_of(job)
        content = conclusions(job, outcomes, failed, left_out) | {"plan": plan}
        save(options.out, content)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    gpu_report.conclude(content)
    if options.smoke:
        print("A smoke run: everything ran that is said to; the figures mean nothing.")
    if any(name.startswith("ours") for name in failed.keys() - missing.keys()):
        return 1
    return UNFINISHED if left_out else 0


def choose_trl(job: Job) -> tuple[list[str], dict[str, str]]:
    """As gpu_trl.choose; everything fits on a CPU."""
    options, shape = job.options, job.shape
    shape = dataclasses.replace(shape, num_layers=options.trl_fit_layers or shape.num_layers)
    memory = job.machine.get("gpu_memory_bytes", 1 << 40)
    return gpu_trl.choose(options.trl, shape, job.lengths, options.global_batch, memory, options.trl_from)


def save(path: Path | None, content: dict[str, Any]) -> None:
    """Whole or not at all: whatever ends this process, the file holds the runs that had ended."""
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def describe(job: Job) -> None:
    """What will run, with everything that was chosen for this machine."""
    machine, shape = job.machine, job.shape
    burst, sustained = machine["matrix_rate_tflops"], machine["sustained_matrix_rate_tflops"]
    print(f"{machine.get('gpu', 'CPU')}: {burst:.1f} TFLOP/s in products of bf16 matrices, {sustained:.1f} over 5 s")
    left_out = gpu_inputs.SHAPES[job.options.model].num_layers - shape.num_layers
    layers = f"{shape.num_layers} layers" + (f", {left_out} LEFT OUT for this GPU's memory" if left_out else "")
    print(f"{job.options.model}: {layers}, {shape.parameters:,} random parameters")
    state = gpu_report.state_bytes(shape, lean=job.lean) / gpu_report.GIB
    what = "bfloat16 moments, no second copy" if job.lean else "float32 weights, gradients and moments"
    print(f"ours: {what}: {state:.1f} GiB of weights, reference, gradients and optimizer state")
    print(f"{len(job.lengths)} pairs, {gpu_report.summary_of(job.lengths)}", flush=True)


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    sys.exit(main())
