"""A plan as tables for people, and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from megadpo.plan.gpus import GIB
from megadpo.plan.plan import Job, Plan, memory_limit
from megadpo.plan.suggest import Suggestion

ESTIMATE = "an estimate from datasheets and the assumptions below, not a measurement"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything the tables show; bytes, seconds and counts, unrounded."""
    return {**_plan_json(plan), **_assumed_json(plan.job)}


def suggestions_json(suggestions: Sequence[Suggestion]) -> dict[str, Any]:
    """The same for each suggestion, best first."""
    plans = [{"overrides": list(one.overrides), **_plan_json(one.plan)} for one in suggestions]
    return {"suggestions": plans, **_assumed_json(suggestions[0].plan.job)}


def _assumed_json(job: Job) -> dict[str, Any]:
    gpu = None if job.gpu is None else dataclasses.asdict(job.gpu)
    return {"gpu": gpu, "assumptions": dataclasses.asdict(job.assumed)}


def _plan_json(plan: Plan) -> dict[str, Any]:
    job = plan.job
    return {
        "world_size": job.world_size,
        "layout": {
            "tensor_parallel": plan.grid.tensor,
            "context_parallel": plan.grid.context,
            "pipeline_parallel": plan.grid.pipeline,
            "virtual_pipeline": plan.grid.virtual_pipeline,
            "data_parallel": plan.grid.data,
            "expert_parallel": plan.grid.expert,
            "expert_tensor_parallel": plan.grid.expert_tensor,
            "expert_data_parallel": plan.grid.expert_replicas,
            "sequence_parallel": plan.sequence_parallel,
        },
        "lengths": job.said,
        "pack_tokens": plan.pack_tokens,
        "pairs_per_step": plan.work.pairs_per_batch,
        "tokens_per_step": plan.work.tokens_per_step(),
        "micro_batches": plan.work.micro_batches,
        "memory_limit_bytes": None if job.gpu is None else memory_limit(job.gpu, job.assumed),
        "stages": [
            {
                **dataclasses.asdict(one),
                "static_bytes": one.static.total,
                "peak_bytes": one.peak,
                "peak_phase": one.peak_phase,
            }
            for one in plan.stages
        ],
        "expected": None
        if plan.time is None
        else {"what": ESTIMATE, "step_s": plan.time.total_s, **dataclasses.asdict(plan.time)},
    }


def print_plan(plan: Plan, console: Console) -> None:
    """The memory of each stage, the step, and every assumption."""
    job = plan.job
    sequence = ", sequence parallel" if plan.sequence_parallel else ""
    console.print(
        f"[bold]{job.arch.hf_class}[/bold], {job.arch.num_layers} layers, on {job.world_size} ranks"
        f"{'' if job.gpu is None else f' of {job.gpu.name}'}: "
        f"{plan.grid}{sequence}; {job.cfg.policy.precision}; {_recompute(job)}"
    )
    console.print(_memory_table(plan))
    if job.gpu is not None:
        limit, fullest = memory_limit(job.gpu, job.assumed), plan.peak_bytes
        console.print(f"Fullest rank: {fullest / GIB:.1f} of {limit / GIB:.1f} GiB ({fullest / limit:.0%}).")
    console.print(_step_lines(plan))
    for line in _assumption_lines(job):
        console.print(line, style="dim")


def _memory_table(plan: Plan) -> Table:
    table = Table(
        title=f"GiB a rank, activations at {plan.pack_tokens} tokens a micro-batch",
        title_justify="left",
        box=box.SIMPLE,
    )
    columns = ("stage", "layers", "parameters", "weights", "gradients", "optimizer", "reference", "in flight")
    for name in (*columns, "activations", "peak", "peak in"):
        table.add_column(name, justify="right")
    for low, high, one in _alike(plan):
        static = one.static
        sizes = (static.weights, static.gradients, static.optimizer, static.reference)
        table.add_row(
            str(low) if low == high else f"{low}-{high}",
            str(one.layers),
            f"{one.parameters:,}",
            *(_gib(size) for size in sizes),
            str(one.in_flight),
            _gib(one.activations + one.buffers),
            _gib(one.peak),
            one.peak_phase,
        )
    return table


def _alike(plan: Plan) -> list[tuple[int, int, Any]]:
    """Neighbouring stages that differ in nothing but their number, as (first, last, stage)."""
    runs: list[tuple[int, int, Any]] = []
    for one in plan.stages:
        if runs and dataclasses.replace(runs[-1][2], stage=one.stage) == one:
            runs[-1] = (runs[-1][0], one.stage, one)
        else:
            runs.append((one.stage, one.stage, one))
    return runs


def _step_lines(plan: Plan) -> str:
    work, time = plan.work, plan.time
    lines = [
        f"A step: {work.pairs_per_batch} pairs, {work.tokens_per_step():,.0f} tokens, {work.micro_batches} micro-batches a "
        f"rank ({plan.job.said})."
    ]
    if time is None:
        lines.append("No expected time: there is no datasheet for CPUs here.")
        return "\n".join(lines)
    lines += [
        f"Expected step time {_seconds(time.total_s)}, MFU {time.mfu:.0%}, bubble {time.bubble:.0%} ({ESTIMATE}):",
        f"  reference {_seconds(time.reference_s)}, forward and backward {_seconds(time.train_s)}, data-parallel "
        f"communication {_seconds(time.data_parallel_s)}, optimizer {_seconds(time.optimizer_s)}",
        f"  {time.flops / 1e15:.3g} PFLOP a step; {work.pairs_per_batch / time.total_s:.3g} pairs/s, "
        f"{work.tokens_per_step() / time.total_s / plan.job.world_size:,.0f} tokens/s a GPU",
    ]
    return "\n".join(lines)


def _assumption_lines(job: Job) -> list[str]:
    lines = []
    if job.gpu is not None:
        gpu = job.gpu
        peak = f"{gpu.bf16_flops / 1e12:g} bf16 and {gpu.fp32_flops / 1e12:g} fp32 TFLOP/s"
        lines.append(
            f"{gpu.name}: {peak}, {gpu.hbm_bytes / 1e9:g} GB at {gpu.hbm_bytes_per_s / 1e12:g} TB/s, NVLink "
            f"{gpu.nvlink_bytes_per_s / 1e9:g} and network {gpu.network_bytes_per_s / 1e9:g} GB/s one way ({gpu.source})"
        )
        assumed = ", ".join(f"{name}={value:g}" for name, value in dataclasses.asdict(job.assumed).items())
        lines.append(f"Assumed (--assume NAME=VALUE): {assumed}")
    return lines


def suggestions_table(suggestions: Sequence[Suggestion]) -> RenderableType:
    """Ranked, fastest first; the overrides below it."""
    table = Table(title=f"Suggested layouts, best first: {ESTIMATE}", title_justify="left", box=box.SIMPLE)
    names = ("", "layout", "recompute", "micro-batches", "peak GiB", "bubble", "step", "MFU")
    for name in names:
        table.add_column(name, justify="right")
    for rank, one in enumerate(suggestions, 1):
        plan, time = one.plan, one.plan.time
        assert time is not None
        table.add_row(
            str(rank),
            str(plan.grid),
            _recompute(plan.job).removeprefix("recompute "),
            str(plan.work.micro_batches),
            _gib(plan.peak_bytes),
            f"{time.bubble:.0%}",
            _seconds(time.total_s),
            f"{time.mfu:.0%}",
        )
    return table


def _recompute(job: Job) -> str:
    megatron = job.cfg.policy.megatron_cfg
    return f"recompute {megatron.recompute_granularity if megatron.activation_checkpointing else 'none'}"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
