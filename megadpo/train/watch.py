"""The machine's metrics of a step: the peak memory of a rank and, with logger.monitor_gpus, the GPUs' load, memory, power."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import torch

from megadpo.parallel import ParallelContext

GIB = 2**30
PEAK = "machine/peak_memory_gib"
GPU_NUMBERS = ("utilization", "memory_gib", "power_w")
"""The metrics of each GPU; their full names are machine/gpu_<n>_<name>."""


class MachineWatch:
    """Reads the machine's metrics after each step. Every rank makes one, and all call `read` together."""

    def __init__(self, parallel: ParallelContext, *, monitor_gpus: bool) -> None:
        """monitor_gpus: read the GPUs that the first rank's process sees, on CUDA. Raises NVML's errors."""
        self._parallel = parallel
        watched = monitor_gpus and parallel.rank == 0 and parallel.device.type == "cuda"
        self._gpus = _gpus() if watched else []

    def read(self) -> dict[str, float | None]:
        """The metrics of the step that ended, by their full names. Collectives: `ParallelContext.largest`.

        The peak is that of the rank with the highest. On a GPU it is the most that torch allocated since the last call, which
        resets it. On a CPU it is the process' highest resident memory since it began.
        """
        peak = self._parallel.largest(_peak_bytes(self._parallel.device))
        found: dict[str, float | None] = {PEAK: peak / GIB}
        for number, handle in enumerate(self._gpus):
            found |= {f"machine/gpu_{number}_{name}": value for name, value in _gpu_numbers(handle).items()}
        return found


def _peak_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _gpus() -> list[Any]:
    """NVML's handles of the GPUs that this process sees (CUDA_VISIBLE_DEVICES), in the order in which it sees them."""
    import pynvml

    pynvml.nvmlInit()
    ids = [torch.cuda.get_device_properties(number).uuid for number in range(torch.cuda.device_count())]
    return [pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{one}") for one in ids]


def _gpu_numbers(handle: Any) -> dict[str, float | None]:
    """The values of GPU_NUMBERS: percent of the sample time in which a kernel ran, GiB in use by all processes, watts. None
    where the GPU doesn't report a value."""
    import pynvml

    def ask(question: Callable[[], float]) -> float | None:
        try:
            return question()
        except pynvml.NVMLError:  # the GPU doesn't have this metric, or was lost: then the next step fails anyway
            return None

    answers = (
        ask(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB),
        ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    )
    return dict(zip(GPU_NUMBERS, answers, strict=True))
