"""Profiles training steps: a torch profiler trace, the largest costs as text, and a chart of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megadpo.config.grid import Grid
from megadpo.config.schema import Config
from megadpo.parallel import initialize, setup_device
from megadpo.parallel.lifetime import end_with_launcher
from megadpo.train.refusals import before_groups
from megadpo.train.setup import prepare

SHOWN = 14


@dataclass(frozen=True)
class Cost:
    """The calls of one kernel (on a CPU: of one operator)."""

    name: str
    ms_per_step: float
    calls_per_step: float
    share: float
    """Share of the time of all kernels."""


@dataclass(frozen=True)
class StepProfile:
    """The recorded steps, after the warm-up steps."""

    device: str
    steps: int
    step_ms: float
    """Wall-clock, with the profiler on."""
    busy: float
    """Time of all kernels / wall-clock. The rest is idle. (Kernels that run at the same time count twice.)"""
    costs: Sequence[Cost]
    """Largest first."""

    def words(self) -> list[str]:
        """A line for the step, and a line for each of the three largest costs."""
        what = "kernels" if self.device == "cuda" else "operators"
        lines = [f"{self.step_ms:.1f} ms a step with the profiler on, {self.busy:.0%} of it in {what}"]
        for rank, cost in enumerate(self.costs[:3], start=1):
            lines.append(f"{rank}. {cost.name}: {cost.share:.1%}, {cost.ms_per_step:.2f} ms a step")
        return lines


def profile_run(cfg: Config, *, warmup: int, steps: int, trace: Path | None) -> StepProfile:
    """Starts a run of `cfg`, makes `warmup` steps, and records `steps` more, over as many epochs as they take. It saves and
    logs nothing, except the log-probabilities of a cached reference for these steps.

    trace: rank 0 writes the timeline for Perfetto or chrome://tracing to this file (.json or .json.gz); None: no file.
    Collectives: the run's.
    """
    end_with_launcher()
    cfg = dataclasses.replace(
        cfg,
        checkpointing=dataclasses.replace(cfg.checkpointing, enabled=False),
        # a cached reference is computed before training for all pairs of these steps
        dpo=dataclasses.replace(cfg.dpo, max_num_steps=warmup + steps, max_num_epochs=warmup + steps),
        data=dataclasses.replace(cfg.data, val_data_paths=None),
    )
    device = before_groups(partial(setup_device, cfg.policy.device))
    run = prepare(cfg, initialize(Grid.of(cfg), device))
    batches = chain.from_iterable(map(run.inputs.train_loader.batches, count()))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    for _ in range(warmup):
        run.trainer.step(next(batches))
    _wait(device)
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            run.trainer.step(next(batches))
        _wait(device)
        seconds = time.perf_counter() - started
    if trace is not None and run.parallel.rank == 0:
        profiler.export_chrome_trace(str(trace))
    return summary(profiler.key_averages(), device.type, steps, seconds)


def summary(events: Any, device: str, steps: int, seconds: float) -> StepProfile:
    """events: torch.profiler's key_averages. On CUDA: kernels and copies, with their time on the device. On a CPU:
    operators, with their own time, without that of operators that they call."""
    found = []
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if (
            on_device != (device == "cuda") or event.is_user_annotation
        ):  # an annotation's kernels are counted themselves
            continue
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        if microseconds > 0:
            found.append((event.key, microseconds, event.count))
    total = sum(microseconds for _, microseconds, _ in found) or 1.0
    costs = [
        Cost(name, microseconds / 1e3 / steps, count / steps, microseconds / total)
        for name, microseconds, count in sorted(found, key=lambda one: -one[1])
    ]
    return StepProfile(device, steps, seconds * 1e3 / steps, total / 1e6 / seconds, costs)


def draw(profile: StepProfile, title: str, path: Path) -> None:
    """Draws the largest costs as bars, with the text of the three largest as title. Needs matplotlib (extra 'report')."""
    from matplotlib.figure import Figure

    shown = list(profile.costs[:SHOWN])[::-1]
    figure = Figure(figsize=(11, 1.8 + 0.34 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = ["#b3541e" if rank >= len(shown) - 3 else "#5b7c99" for rank in range(len(shown))]
    axes.barh([_short(cost.name) for cost in shown], [cost.ms_per_step for cost in shown], color=colours)
    for row, cost in enumerate(shown):
        axes.text(
            cost.ms_per_step, row, f" {cost.share:.1%}, {cost.calls_per_step:,.0f} calls", va="center", fontsize=8
        )
    axes.set_xlabel("ms a step, this kernel's own time" if profile.device == "cuda" else "ms a step, own time")
    axes.margins(x=0.2)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    words = [_short(line, 110) for line in profile.words()]
    axes.set_title("\n".join([title, *words]), loc="left", fontsize=9)
    figure.savefig(path, dpi=130)


def _short(name: str, longest: int = 60) -> str:
    return name if len(name) <= longest else name[: longest - 3] + "..."


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
