"""The machine's numbers of a step: peak memory over the ranks, and the GPUs by a stand-in for NVML."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from megadpo.config.known import Known, Machine, find_problems
from megadpo.train import watch
from megadpo.train.watch import GIB, PEAK, MachineWatch
from tests.helpers.distributed import run_distributed


class NVMLError(Exception):
    pass


@pytest.fixture
def two_gpus(monkeypatch):
    """torch sees the second and the first of NVML's GPUs, in that order; the first tells no power."""
    nvml = ModuleType("pynvml")
    numbers = {"GPU-one": (97, 10 * GIB, None), "GPU-two": (3, 20 * GIB, 700_500)}

    def power(handle):
        if numbers[handle][2] is None:
            raise NVMLError("not supported")
        return numbers[handle][2]

    nvml.NVMLError, nvml.nvmlInit, nvml.nvmlDeviceGetHandleByUUID = NVMLError, lambda: None, lambda uuid: uuid
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=numbers[handle][0])
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=numbers[handle][1])
    nvml.nvmlDeviceGetPowerUsage = power
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=["two", "one"][n]))


def rank(number, device="cuda"):
    return SimpleNamespace(rank=number, device=torch.device(device), largest=lambda number: number)


def test_the_gpus_that_this_process_sees_in_its_order(two_gpus, monkeypatch):
    seen = MachineWatch(rank(0), monitor_gpus=True)
    monkeypatch.setattr(watch, "_peak_bytes", lambda device: 3 * GIB)
    assert seen.read() == {
        PEAK: 3.0,
        "machine/gpu_0_utilization": 3,
        "machine/gpu_0_memory_gib": 20.0,
        "machine/gpu_0_power_w": 700.5,
        "machine/gpu_1_utilization": 97,
        "machine/gpu_1_memory_gib": 10.0,
        "machine/gpu_1_power_w": None,
    }


@pytest.mark.parametrize(("number", "device", "monitor"), [(1, "cuda", True), (0, "cpu", True), (0, "cuda", False)])
def test_nobody_else_asks_nvml(number, device, monitor, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import of it fails
    assert MachineWatch(rank(number, device), monitor_gpus=monitor)._gpus == []


def test_a_gpus_peak_starts_again_after_it_was_read(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: done.append("read") or 7)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    assert watch._peak_bytes(torch.device("cuda", 0)) == 7 and done == ["read", "reset"]


def peak_of_a_rank():
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(), setup_device("cpu"))
    held = torch.ones(40 * 2**20 * (1 + 4 * parallel.rank), dtype=torch.uint8)  # the second rank has most
    found = MachineWatch(parallel, monitor_gpus=False).read()
    return watch._peak_bytes(torch.device("cpu")) / GIB, found[PEAK], len(held)


@pytest.mark.distributed
def test_the_peak_is_that_of_the_rank_that_had_most():
    (first, said, _), (second, said_too, _) = run_distributed(peak_of_a_rank, 2, init_process_group=False)
    assert said == said_too == pytest.approx(max(first, second), rel=1e-2)
    assert second > first + 0.1


def test_a_gpu_machine_without_the_package_refuses_it_by_name_if_asked(config):
    missing = Machine(device="cuda", why_missing=lambda name: f"{name} is not installed" if name == "pynvml" else None)
    asked = Known(cfg=config(logger__monitor_gpus=True), machine=missing)
    (problem,) = [one for one in find_problems(asked) if one.where.startswith("logger")]
    assert problem.where == "logger.monitor_gpus" and "pip install nvidia-ml-py" in problem.fix
    there = Machine(device="cuda")
    on_cpu = Machine(device="cpu", why_missing=missing.why_missing)
    for known in (Known(cfg=config(), machine=missing), Known(cfg=asked.cfg, machine=there),
                  Known(cfg=asked.cfg, machine=on_cpu), Known(cfg=asked.cfg)):  # fmt: skip
        assert not [one for one in find_problems(known) if one.where.startswith("logger")]


def test_on_a_cpu_it_is_noted(config):
    (note,) = config(logger__monitor_gpus=True, policy__device="cpu").notes
    assert note.startswith("logger.monitor_gpus: True has no effect")
