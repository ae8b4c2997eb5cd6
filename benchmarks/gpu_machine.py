"""The GPU that a benchmark ran on: what it is, what software it has, and the two rates that everything is held against."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks import gpu_code

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "liger-kernel",
    "flash-attn",
    "apex",
    "numpy",
)
SWITCHES = ("PYTORCH_", "NVTE_", "NCCL_", "CUDA_VISIBLE", "TRITON_", "CUBLAS_")
"""Beginnings of the environment variables that change what runs."""
DATASHEET_BF16_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "B200": 2250.0}
"""Dense, by the vendor's datasheets; SXM parts."""


def machine() -> dict[str, Any]:
    """Hardware, versions, code, commit and date, for a result's JSON."""
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "versions": {name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(SWITCHES)},
        "code": gpu_code.digest(),
        "commit": gpu_code.commit(),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["gpu_compute_capability"] = [properties.major, properties.minor]
        found["gpu_multiprocessors"] = properties.multi_processor_count
        found["driver"] = _driver()
    return found


def _driver() -> str:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def version(package: str) -> str | None:
    """Installed version; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def datasheet_tflops(gpu: str) -> float | None:
    """Dense bf16 rate of the vendor's datasheet, for the GPUs listed above."""
    return next((rate for name, rate in DATASHEET_BF16_TFLOPS.items() if name in gpu), None)


def milliseconds(work: Any, device: torch.device, *, repeats: int, warmup: int = 3) -> float:
    """Median over `repeats` calls of `work`, by the device's own clock on CUDA."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - started))
        return statistics.median(times)
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def matrix_rate_tflops(device: torch.device) -> float:
    """bf16 products of random 8192 x 8192 matrices (512 on a CPU, in float32): 2 n^3 operations over the median time."""
    a, b = _factors(device)
    out = torch.empty_like(a)
    return 2 * a.shape[0] ** 3 / milliseconds(lambda: torch.mm(a, b, out=out), device, repeats=20) / 1e9


def sustained_matrix_rate_tflops(device: torch.device) -> float:
    """The same products for 5 s (0.2 on a CPU), by the second half of them: a burst runs at a clock that the power limit does
    not leave to a training."""
    seconds = 5.0 if device.type == "cuda" else 0.2
    a, b = _factors(device)
    out = torch.empty_like(a)

    def rate(seconds: float) -> float:
        started, products = time.perf_counter(), 0
        while (spent := time.perf_counter() - started) < seconds:
            for _ in range(50):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            products += 50
        return 2 * a.shape[0] ** 3 * products / spent / 1e12

    rate(seconds / 2)
    return rate(seconds / 2)


def _factors(device: torch.device) -> list[torch.Tensor]:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    return [torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)]


def copy_rate_gbytes(device: torch.device) -> float:
    """Device-to-device copy of 4 GiB (16 MiB on a CPU), bytes read and written over the median time."""
    size = (1 << 32) if device.type == "cuda" else (1 << 24)
    source = torch.ones(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source), device, repeats=10) / 1e6


def main() -> int:
    """`python -m benchmarks.gpu_machine`: machine and rates as JSON, measured in this process and gone with it."""
    import json

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content = machine()
    content["matrix_rate_tflops"] = matrix_rate_tflops(device)
    content["sustained_matrix_rate_tflops"] = sustained_matrix_rate_tflops(device)
    content["copy_rate_gbytes_per_s"] = copy_rate_gbytes(device)
    print(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
