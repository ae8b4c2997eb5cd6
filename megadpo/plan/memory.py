"""Memory of GPUs, from datasheets, and assumptions of the plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megadpo.config.problems import ConfigError, Problem

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    hbm_bytes: float
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="a10", hbm_bytes=24e9, source="NVIDIA A10 datasheet: 24 GB GDDR6"),
        Gpu(name="a100", hbm_bytes=80e9, source="NVIDIA A100 80GB datasheet, SXM4"),
        Gpu(name="h100", hbm_bytes=80e9, source="NVIDIA H100 datasheet, SXM5"),
        Gpu(name="h200", hbm_bytes=141e9, source="NVIDIA H200 datasheet, SXM5"),
        Gpu(name="b200", hbm_bytes=180e9, source="NVIDIA DGX B200 datasheet: 1,440 GB in 8 GPUs"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions. They were not measured on the user's cluster; `--assume name=value` changes one."""

    gpus_per_node: float = 8
    expert_load: float = 1.25
    """Tokens of the busiest rank's experts / tokens with even routing."""
    reserve_gib: float = 3.0
    """GPU memory that tensors can't use: CUDA context, NCCL buffers, cuBLAS workspaces."""
    allocator_slack: float = 0.05
    """Share of the peak that torch's allocator loses by rounding and fragmentation."""


def memory_limit(gpu: Gpu, assumed: Assumptions) -> float:
    """Limit on the peak bytes of a rank's tensors."""
    return (gpu.hbm_bytes - assumed.reserve_gib * GIB) / (1 + assumed.allocator_slack)


def parse_assumptions(pairs: Sequence[str]) -> Assumptions:
    """pairs: `name=value`. Raises ConfigError with every unknown name and every invalid value."""
    names = {field.name for field in dataclasses.fields(Assumptions)}
    values: dict[str, float] = {}
    problems = []
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in names:
            problems.append(Problem("--assume", pair, "one of " + ", ".join(sorted(names)), "correct the name"))
            continue
        try:
            values[name] = float(text)
        except ValueError:
            values[name] = float("nan")
        at_least = 1 if name in ("gpus_per_node", "expert_load") else 0
        if not at_least <= values[name] < float("inf"):
            problems.append(Problem(f"--assume {name}", text, f"a number, {at_least} or more", "correct the value"))
    if problems:
        raise ConfigError(problems)
    return Assumptions(**values)
