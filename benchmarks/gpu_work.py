"""Whether the contenders of benchmarks/gpu.py did the same work, and what of an earlier call's results still holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import gpu_code
from benchmarks.gpu_contenders import FLOAT8
from benchmarks.gpu_inputs import Lengths
from benchmarks.gpu_sides import OUT_OF_MEMORY, Outcome

FIRST_STEP_TOLERANCE = 1e-2
"""Relative, of step 1's mean logps and gradient norm."""
NATS_A_TOKEN = 0.15
"""Of one token's logp: five times what bfloat16 is expected to be off at 8B's size. Random weights give a token's logp a
standard deviation of 1.3 nats, so wrong work is seen; 1% of a sum over an answer's tokens is more than that."""
LOSS_TOLERANCE = {"cuda": 5e-2, "cpu": 1e-4}
"""Relative, of each step's loss. Losses near ln 2 agree whatever was computed: this finds only what runs away."""
SAME = ("model", "layers", "lengths", "optimizer", "pack_tokens", "global_batch", "warmup_steps", "steps", "override")
"""Options that two calls share where one continues the other."""


def first_steps(outcomes: Mapping[str, list[Outcome]]) -> dict[str, dict[str, float]]:
    """What step 1 was, of everybody's first run that came to its end."""
    whole = {name: next((run for run in runs if run.error is None), None) for name, runs in outcomes.items()}
    return {name: run.first_step for name, run in whole.items() if run is not None and run.first_step}


def different_first_steps(steps: Mapping[str, Mapping[str, float]], first_batch: Lengths) -> list[str]:
    """Where somebody's first step is not the first one's: mean logps/chosen and logps/rejected, and the gradient's norm
    before clipping. Both sides start from the same weights and take the same pairs. first_batch: step 1's lengths."""
    found = []
    compared = {name: values for name, values in steps.items() if name not in FLOAT8}
    first = next(iter(compared), "")
    for other in list(compared)[1:]:
        for what, a in compared[first].items():
            b = compared[other].get(what, math.nan)
            allowed = FIRST_STEP_TOLERANCE * max(abs(a), abs(b))
            if what.startswith("logps/"):
                tokens = first_batch[:, 1 if what.endswith("chosen") else 2].sum()
                allowed = min(allowed, NATS_A_TOKEN * math.sqrt(tokens) / len(first_batch))
            if not abs(a - b) <= allowed:
                found.append(f"step 1's {what}: {first} {a:.6g}, {other} {b:.6g}, {allowed:.2g} allowed")
    return found


def different_losses(losses: Mapping[str, list[float]], device: str) -> list[str]:
    """Steps at which somebody's loss is not the first one's. Float8's are held to a tolerance of their own
    (gpu_report.float8_beside)."""
    compared = {name: values for name, values in losses.items() if name not in FLOAT8}
    found = []
    first = next(iter(compared), "")
    for other in list(compared)[1:]:
        for step, (a, b) in enumerate(zip(compared[first], compared[other], strict=False), start=1):
            if not abs(a - b) <= LOSS_TOLERANCE[device] * max(abs(a), abs(b)):
                found.append(f"step {step}'s loss: {first} {a:.6f}, {other} {b:.6f}")
    return found


def continued(path: Path | None, options: Mapping[str, str], machine: Mapping[str, Any]) -> dict[str, list[Outcome]]:
    """Runs of an earlier call with the same settings, where gpu_code.continues, from its result file: those that came to
    their end, and those that ran out of memory. None where there is no such file."""
    if path is None or not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if any(earlier.get("options", {}).get(name) != options[name] for name in SAME):
        return {}
    if not gpu_code.continues(earlier["machine"], machine):
        return {}
    runs = {name: [Outcome(**one) for one in runs] for name, runs in earlier["runs"].items()}
    kept = {name: [run for run in found if run.error in (None, OUT_OF_MEMORY)] for name, found in runs.items()}
    return {name: found for name, found in kept.items() if found}
