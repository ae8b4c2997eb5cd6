"""Shows a plan as tables and a picture, and writes it as JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megadpo.plan.memory import GIB, memory_limit
from megadpo.plan.plan import Job, Plan, StagePlan
from megadpo.plan.suggest import Suggestion

_MOST_COPIES_IN_TEXT = 8
_MOST_COPIES_DRAWN = 16


def plan_json(plan: Plan) -> dict[str, Any]:
    """All numbers of the tables, not rounded."""
    return {**_of_layout(plan), **_assumed_json(plan.job)}


def suggestions_json(suggestions: Sequence[Suggestion]) -> dict[str, Any]:
    """The same numbers for each suggestion, best first."""
    plans = [
        {"overrides": list(one.overrides), "needed_share": one.needed_share, **_of_layout(one.plan)}
        for one in suggestions
    ]
    return {"suggestions": plans, **_assumed_json(suggestions[0].plan.job)}


def _assumed_json(job: Job) -> dict[str, Any]:
    gpu = None if job.gpu is None else dataclasses.asdict(job.gpu)
    return {"gpu": gpu, "assumptions": dataclasses.asdict(job.assumed)}


def _of_layout(plan: Plan) -> dict[str, Any]:
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
        "lengths": plan.work.origin,
        "pack_tokens": plan.pack_tokens,
        "pairs_per_step": plan.work.pairs_per_batch,
        "rankings_per_step": plan.work.rankings_per_batch,
        "tokens_per_step": plan.work.tokens_per_step,
        "flops_per_step": plan.flops_per_step,
        "micro_batches": plan.work.micro_batches,
        "slots": {**dataclasses.asdict(plan.slots), "bubble": plan.slots.bubble},
        "checkpoint_bytes": dataclasses.asdict(plan.checkpoint),
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
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the memory of each stage, a step, a checkpoint, and every assumption."""
    job, work = plan.job, plan.work
    sequence = ", sequence parallel" if plan.sequence_parallel else ""
    console.print(
        f"[bold]{job.arch.hf_class}[/bold], {job.arch.num_layers} layers, on {job.world_size} ranks"
        f"{'' if job.gpu is None else f' of {job.gpu.name}'}: "
        f"{plan.grid}{sequence}; {job.cfg.policy.precision}; recompute {_recompute(job)}"
    )
    console.print(_memory_table(plan))
    if job.gpu is not None:
        limit, fullest = memory_limit(job.gpu, job.assumed), plan.peak_bytes
        console.print(f"Most memory of a rank: {fullest / GIB:.1f} of {limit / GIB:.1f} GiB ({fullest / limit:.0%}).")
    rankings = "" if work.rankings_per_batch is None else f"{work.rankings_per_batch} rankings, "
    console.print(
        f"A step: {rankings}{work.pairs_per_batch:g} pairs, {work.tokens_per_step:,.0f} tokens, "
        f"{plan.flops_per_step / 1e15:.3g} PFLOP, {work.micro_batches} micro-batches for each rank ({work.origin})."
    )
    console.print(
        f"Pipeline: {plan.slots.idle} of {plan.slots.busy + plan.slots.idle} slots of a stage are idle (bubble "
        f"{plan.slots.bubble:.0%}). A slot is the forward and backward of a micro-batch through one chunk."
    )
    sizes = (plan.checkpoint.weights, plan.checkpoint.with_optimizer)
    console.print("A checkpoint: {} GiB with the optimizer, {} GiB weights only.".format(*map(_gib, reversed(sizes))))
    if job.gpu is not None:
        assumed = ", ".join(f"{name}={value:g}" for name, value in dataclasses.asdict(job.assumed).items())
        console.print(f"{job.gpu.name}: {job.gpu.hbm_bytes / 1e9:g} GB ({job.gpu.source})", style="dim")
        console.print(f"Assumed (--assume NAME=VALUE): {assumed}", style="dim")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _memory_table(plan: Plan) -> Table:
    names = "stage,layers,parameters,weights,gradients,optimizer,reference,in flight,activations,peak,peak in"
    table = _table(f"GiB per rank, activations for {plan.pack_tokens} tokens per micro-batch", names.split(","))
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


def _alike(plan: Plan) -> list[tuple[int, int, StagePlan]]:
    """(first, last, stage) for each run of neighbouring stages that differ only in their number."""
    runs: list[tuple[int, int, StagePlan]] = []
    for one in plan.stages:
        if runs and dataclasses.replace(runs[-1][2], stage=one.stage) == one:
            runs[-1] = (runs[-1][0], one.stage, one)
        else:
            runs.append((one.stage, one.stage, one))
    return runs


def suggestions_table(suggestions: Sequence[Suggestion]) -> Table:
    """A table of the suggestions, best first."""
    names = "rank,tensor,context,expert,pipeline,chunks,data,layers,recompute,micro-batches,bubble,needed,peak GiB"
    table = _table("Layouts that fit, best first (docs/planning.md has the order)", names.split(","))
    for rank, one in enumerate(suggestions, 1):
        plan, grid = one.plan, one.plan.grid
        runs = [(layers, len(list(same))) for layers, same in itertools.groupby(stage.layers for stage in plan.stages)]
        table.add_row(
            *map(str, (rank, grid.tensor, grid.context, grid.expert, grid.pipeline, grid.virtual_pipeline, grid.data)),
            " + ".join(str(layers) if count == 1 else f"{count}x{layers}" for layers, count in runs),
            _recompute(plan.job),
            str(plan.work.micro_batches),
            f"{plan.slots.bubble:.0%}",
            f"{one.needed_share:.0%}",
            _gib(plan.peak_bytes),
        )
    return table


def _recompute(job: Job) -> str:
    megatron = job.cfg.policy.megatron_cfg
    return megatron.recompute_granularity if megatron.activation_checkpointing else "none"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def text_grid(plan: Plan) -> str:
    """A row for each pipeline stage, a column for each data-parallel copy. A cell has the ranks that share a micro-batch."""
    copies = list(range(plan.grid.data))
    shown = copies if plan.grid.data <= _MOST_COPIES_IN_TEXT else [*copies[: _MOST_COPIES_IN_TEXT - 1], copies[-1]]
    rows = [["", "", "", *(f"copy {copy}" for copy in shown)]]
    for stage in plan.stages:
        cells = [_ranks(plan, stage.stage, copy) for copy in shown]
        rows.append([f"stage {stage.stage}", f"{stage.layers} layers", f"{stage.peak / GIB:.1f} GiB", *cells])
    if len(shown) < plan.grid.data:
        for row in rows:
            row.insert(-1, "...")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _ranks(plan: Plan, stage: int, copy: int) -> str:
    together = plan.grid.tensor * plan.grid.context
    first = plan.grid.stage(stage).rank + copy * together
    return str(first) if together == 1 else f"{first}-{first + together - 1}"


def draw(plan: Plan, path: Path) -> None:
    """Draws a box for each rank, coloured by its stage's memory. A thick line is the end of a node."""
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    copies, together = min(plan.grid.data, _MOST_COPIES_DRAWN), plan.grid.tensor * plan.grid.context
    width, height = copies * together, plan.grid.pipeline
    figure = Figure(figsize=(min(3.0 + 0.3 * width, 30), 1.6 + 0.5 * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    limit = memory_limit(plan.job.gpu, plan.job.assumed) if plan.job.gpu is not None else float(plan.peak_bytes)
    node = int(plan.job.assumed.gpus_per_node)
    for stage in plan.stages:
        shade = colormaps["viridis"](0.25 + 0.65 * stage.peak / limit) if stage.peak <= limit else (0.8, 0.1, 0.1, 1.0)
        for column in range(width):
            rank = plan.grid.stage(stage.stage).rank + column
            corner = (column, stage.stage)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=shade, edgecolor="white", linewidth=0.5))
            axes.text(column + 0.5, stage.stage + 0.5, str(rank), ha="center", va="center", fontsize=7, color="white")
            if column and rank % node == 0:
                axes.plot([column, column], [stage.stage, stage.stage + 1], color="black", linewidth=2)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([(copy + 0.5) * together for copy in range(copies)], [f"copy {copy}" for copy in range(copies)])
    labels = [f"stage {one.stage}: {one.layers} layers\n{one.peak / GIB:.1f} GiB" for one in plan.stages]
    axes.set_yticks([stage + 0.5 for stage in range(height)], labels)
    more = f", {copies} of {plan.grid.data} copies shown" if copies < plan.grid.data else ""
    on = "" if plan.job.gpu is None else f" {plan.job.gpu.name}"
    axes.set_title(f"{plan.job.world_size}{on} ranks: {plan.grid}{more}; black: end of a node", fontsize=9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan"}):  # text as text makes a file of a tenth the size
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
