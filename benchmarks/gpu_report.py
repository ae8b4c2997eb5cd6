"""What the runs of benchmarks/gpu.py come to: medians, MFU, memory, and the goals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu_inputs import Lengths, Shape
from benchmarks.gpu_sides import Outcome
from megadpo.config.architecture import Architecture
from megadpo.data.batches.work import WorkModel

GIB = 2**30
GOALS = {"MFU of the measured rate": 0.60, "pairs/s over TRL's": 2.5, "peak memory over TRL's": 0.6, "shared": 1.3}
ALIKE = ", with float32 weights and moments as ours"
PASSES = 4
"""Forward, backward (two), and the reference's forward."""


def step_flops(arch: Architecture, lengths: Lengths, *, share_prompt: bool) -> float:
    """Operations that training on these pairs needs: PASSES times a forward pass's matrix products, each multiply and
    add counted as two; formulas in megadpo/data/batches/work.py. Tokens really computed count, so a shared prompt once; the
    head counts for answer tokens; nothing that is recomputed counts again, nor does padding."""
    work = WorkModel.of(arch)
    prompts, answers = int(lengths[:, 0].sum()), int(lengths[:, 1:].sum())
    tokens = (1 if share_prompt else 2) * prompts + answers
    attention = work.attention(lengths, share_prompt=share_prompt)
    return float(PASSES * (work.per_token * tokens + work.per_answer_token * answers + attention))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians of one contender's rounds."""

    name: str
    shares_prompts: bool
    rounds: int
    pairs_per_s: float
    lowest_pairs_per_s: float
    highest_pairs_per_s: float
    sequence_tokens_per_s: float
    """Tokens of prompt + answer, both answers, per second: the same pairs count alike for everybody."""
    computed_tokens_per_s: float
    """Tokens that went through the layers: a shared prompt once. Of TRL's, padding is left out."""
    tflops: float
    """Of `step_flops`, for the tokens it computes."""
    peak_allocated_bytes: float
    peak_reserved_bytes: float | None


def measured(
    outcomes: list[Outcome],
    arch: Architecture,
    timed: Lengths,
    *,
    warmup_steps: int,
    pairs_per_step: int,
    share_prompt: bool,
) -> Measured | None:
    """None where no round came to an end. timed: lengths of the pairs of the timed steps."""
    speeds = [s for one in outcomes if (s := one.pairs_per_s(warmup_steps, pairs_per_step)) is not None]
    if not speeds:
        return None
    good = [one for one in outcomes if one.error is None]
    prompts, answers = float(timed[:, 0].mean()), float(timed[:, 1:].sum(axis=1).mean())
    flops_per_pair = step_flops(arch, timed, share_prompt=share_prompt) / len(timed)
    speed = median(speeds)
    reserved = [one.peak_reserved_bytes for one in good if one.peak_reserved_bytes is not None]
    return Measured(
        name=outcomes[0].name,
        shares_prompts=share_prompt,
        rounds=len(speeds),
        pairs_per_s=speed,
        lowest_pairs_per_s=min(speeds),
        highest_pairs_per_s=max(speeds),
        sequence_tokens_per_s=speed * (2 * prompts + answers),
        computed_tokens_per_s=speed * ((1 if share_prompt else 2) * prompts + answers),
        tflops=speed * flops_per_pair / 1e12,
        peak_allocated_bytes=median(one.peak_allocated_bytes or 0 for one in good),
        peak_reserved_bytes=median(reserved) if reserved else None,
    )


def table(found: list[Measured], failed: dict[str, str], rate_tflops: float, sheet_tflops: float | None) -> list[str]:
    """Markdown."""
    lines = [
        "| | rounds | pairs/s | lowest to highest | tokens/s computed | TFLOP/s | of the measured rate | of the datasheet "
        "| peak GiB in tensors | taken |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        reserved = "" if one.peak_reserved_bytes is None else f"{one.peak_reserved_bytes / GIB:.1f}"
        sheet = "" if sheet_tflops is None else f"{one.tflops / sheet_tflops:.1%}"
        lines.append(
            f"| {one.name} | {one.rounds} | {one.pairs_per_s:.2f} | {one.lowest_pairs_per_s:.2f} to "
            f"{one.highest_pairs_per_s:.2f} | {one.computed_tokens_per_s:,.0f} | {one.tflops:.3g} | "
            f"{one.tflops / rate_tflops:.1%} | {sheet} | {one.peak_allocated_bytes / GIB:.1f} | {reserved} |"
        )
    return lines + [f"| {name} | does not run: {reason} | | | | | | | | |" for name, reason in failed.items()]


def goals(found: list[Measured], rate_tflops: float) -> list[dict[str, Any]]:
    """Each goal that these runs can be held to. TRL's is the fastest that took part, and that same run's memory; where
    that one keeps bfloat16 weights only, the fastest `trl-mixed` as well."""
    by_name = {one.name: one for one in found}
    ours, unshared = by_name.get("ours"), by_name.get("ours-unshared")
    theirs = [one for one in found if one.name.startswith("trl")]
    values: dict[str, tuple[float, str]] = {}
    if ours is not None:
        values["MFU of the measured rate"] = (ours.tflops / rate_tflops, "bf16 matrix products, same run")
    if ours is not None and theirs:
        fastest = max(theirs, key=lambda one: one.pairs_per_s)
        compared = {"": fastest}
        alike = [one for one in theirs if one.name.startswith("trl-mixed")]
        if alike and not fastest.name.startswith("trl-mixed"):
            compared[ALIKE] = max(alike, key=lambda one: one.pairs_per_s)
        for note, peer in compared.items():
            values["pairs/s over TRL's" + note] = (ours.pairs_per_s / peer.pairs_per_s, peer.name)
            memory = ours.peak_allocated_bytes / peer.peak_allocated_bytes
            values["peak memory over TRL's" + note] = (memory, peer.name)
    if ours is not None and unshared is not None:
        values["shared"] = (ours.pairs_per_s / unshared.pairs_per_s, unshared.name)
    return [
        {
            "what": what,
            "value": value,
            "against": against,
            "goal": (goal := GOALS[what.removesuffix(ALIKE)]),
            "met": value <= goal if "memory" in what else value >= goal,
        }
        for what, (value, against) in values.items()
    ]


def float8_beside(
    found: list[Measured], losses: Mapping[str, list[float]], recipes: Mapping[str, str], tolerance: float
) -> list[dict[str, Any]]:
    """Speed of each float8 contender over `ours`, and the furthest that a step's loss is from `ours`, relative. Neither
    has a goal but `tolerance`, for the losses."""
    by_name = {one.name: one for one in found}
    if "ours" not in by_name:
        return []
    result = []
    for name, recipe in recipes.items():
        if name not in by_name:
            continue
        pairs = zip(losses["ours"], losses[name], strict=False)
        apart = float(np.max([abs(a - b) / abs(a) for a, b in pairs]))  # nan stays nan
        speed_up = by_name[name].pairs_per_s / by_name["ours"].pairs_per_s
        one = {"name": name, "recipe": recipe, "speed_up": speed_up, "losses_apart": apart}
        result.append(one | {"tolerance": tolerance, "within": apart <= tolerance})
    return result


def state_bytes(shape: Shape, *, lean: bool, float8: bool = False) -> int:
    """Weights, reference, gradients and optimizer state: 20 bytes a parameter (2 + 2 + 4 + float32 weights 4 + moments
    8), lean 14 (2 + 2 + 4 + the other half of the weights 2 + moments 4). float8: 3 more, for the policy's weights in
    both orders and the reference's in one."""
    return shape.parameters * ((14 if lean else 20) + (3 if float8 else 0))


def whole_layers(shape: Shape, memory_bytes: int, *, lean: bool, float8: bool = False, spare: float = 0.18) -> int:
    """Layers of `shape` whose state leaves this share of the memory to activations and passing needs; at least 1."""
    for layers in range(shape.num_layers, 1, -1):
        state = state_bytes(dataclasses.replace(shape, num_layers=layers), lean=lean, float8=float8)
        if state <= (1 - spare) * memory_bytes:
            return layers
    return 1


def summary_of(lengths: Lengths) -> dict[str, float]:
    """Mean and most tokens, for the record."""
    names = ("prompt", "chosen", "rejected")
    means = {f"mean_{name}": float(value) for name, value in zip(names, lengths.mean(axis=0), strict=True)}
    return means | {"longest_sequence": float(np.max(lengths[:, 0] + lengths[:, 1:].max(axis=1)))}


def conclude(content: Mapping[str, Any]) -> None:
    """Print a result's tables, goals and warnings."""
    plan = content["plan"]
    print("", *content["table"], "", sep="\n")
    for goal in content["goals"]:
        verdict = "met" if goal["met"] else "not met"
        print(f"{goal['what']}: {goal['value']:.2f} ({goal['against']}); goal {goal['goal']}: {verdict}")
    for one in content["float8"]:
        verdict = "within" if one["within"] else "NOT WITHIN"
        apart = f"losses at most {one['losses_apart']:.2%} apart, {verdict} {one['tolerance']:.0%}"
        print(f"{one['name']} ({one['recipe']}): {one['speed_up']:.2f} times the speed of ours; {apart}")
    if plan and plan.get("stages"):
        print(f"plan's peak: {plan['stages'][0]['peak_bytes'] / GIB:.1f} GiB")
    print("step 1:", *(f"{name} {values}" for name, values in content["first_steps"].items()), sep="\n  ")
    if content["different_work"]:
        print("NOT THE SAME WORK:", *content["different_work"], sep="\n  ")
