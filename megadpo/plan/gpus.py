"""Facts of GPUs from their makers' datasheets, and the plan's stated assumptions of what a run gets out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from megadpo.config.problems import ConfigError, Problem

GIB = 1024**3


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in an 8-GPU SXM node. Rates are peaks of the datasheet, dense (without sparsity), per GPU."""

    name: str
    bf16_flops: float
    """Tensor-core FLOP/s in bfloat16."""
    fp32_flops: float
    """FLOP/s in float32 outside the tensor cores: torch multiplies float32 matrices so unless TF32 is allowed."""
    fp64_flops: float
    """FLOP/s in float64 on the tensor cores, where routers compute by default."""
    hbm_bytes: float
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    """One direction: half of the datasheet's NVLink figure, which adds both."""
    network_bytes_per_s: float
    """One direction, per GPU: the DGX node's compute network, one adapter a GPU."""
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="a100",  # SXM4 80 GB
            bf16_flops=312e12,
            fp32_flops=19.5e12,
            fp64_flops=19.5e12,
            hbm_bytes=80e9,
            hbm_bytes_per_s=2.039e12,
            nvlink_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            source="NVIDIA A100 80GB datasheet (SXM); DGX A100: 8 x 200 Gb/s",
        ),
        Gpu(
            name="h100",  # SXM5 80 GB
            bf16_flops=989.4e12,
            fp32_flops=67e12,
            fp64_flops=67e12,
            hbm_bytes=80e9,
            hbm_bytes_per_s=3.35e12,
            nvlink_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            source="NVIDIA H100 datasheet (SXM; 1,979 TFLOPS is with sparsity); DGX H100: 8 x 400 Gb/s",
        ),
        Gpu(
            name="h200",  # SXM5 141 GB
            bf16_flops=989.4e12,
            fp32_flops=67e12,
            fp64_flops=67e12,
            hbm_bytes=141e9,
            hbm_bytes_per_s=4.8e12,
            nvlink_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            source="NVIDIA H200 datasheet (SXM; 1,979 TFLOPS is with sparsity); DGX H200: 8 x 400 Gb/s",
        ),
        Gpu(
            name="b200",  # SXM6, as in DGX B200: 1,440 GB in 8 GPUs
            bf16_flops=2250e12,
            fp32_flops=80e12,
            fp64_flops=37e12,
            hbm_bytes=180e9,
            hbm_bytes_per_s=8e12,
            nvlink_bytes_per_s=900e9,
            network_bytes_per_s=50e9,
            source="NVIDIA DGX B200 datasheet (1,440 GB, 64 TB/s for 8 GPUs; 4.5 PFLOPS bf16 is with sparsity); 8 x 400 Gb/s",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a run is assumed to reach. None of these was measured on the user's cluster; `--assume name=value` sets one."""

    matmul_efficiency: float = 0.70
    """Share of the peak that large matrix products reach."""
    expert_matmul_efficiency: float = 0.45
    """The same of an expert's products: many small ones."""
    attention_efficiency: float = 0.45
    """Share of the peak that fused attention reaches, forward and backward together."""
    memory_efficiency: float = 0.80
    """Share of the HBM bandwidth that norms, activations and the optimizer reach."""
    nvlink_efficiency: float = 0.75
    network_efficiency: float = 0.75
    collective_latency_s: float = 10e-6
    """Start of one collective."""
    gpus_per_node: float = 8
    expert_load: float = 1.25
    """Tokens at the busiest rank's experts, as a multiple of what even routing would send there."""
    reserve_gib: float = 3.0
    """Memory of a GPU that no tensor can have: CUDA context, NCCL buffers, cuBLAS workspaces."""
    allocator_slack: float = 0.05
    """Part of the peak that torch's allocator loses to rounding and fragmentation."""


def parse_assumptions(pairs: Sequence[str]) -> Assumptions:
    """`name=value` each. Raises ConfigError with every name that is unknown and every value that is no such number."""
    names = {field.name for field in dataclasses.fields(Assumptions)}
    values: dict[str, float] = {}
    problems = []
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in names:
            problems.append(Problem("--assume", pair, "one of " + ", ".join(sorted(names)), "correct the name"))
            continue
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        share = name.endswith("_efficiency")
        at_least = 1 if name in ("gpus_per_node", "expert_load") else 0
        if not (0 < value <= 1 if share else at_least <= value < float("inf")):
            expected = "a number above 0 and at most 1" if share else f"a number, {at_least} or more"
            problems.append(Problem(f"--assume {name}", text, expected, "correct the value"))
        values[name] = value
    if problems:
        raise ConfigError(problems)
    return Assumptions(**values)
