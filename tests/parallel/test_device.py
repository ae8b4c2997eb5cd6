"""The device of a rank on a machine with GPUs, of which there is none here: torch.cuda answers as one would."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from megadpo.config.problems import ConfigError
from megadpo.parallel import machine, setup_device
from megadpo.parallel.device import why_missing
from megadpo.train.check import checked_config
from tests.helpers.distributed import REPOSITORY
from tests.helpers.overrides import MEG
from tests.helpers.runs import make_config, make_model


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, and where set_device went."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    before = torch.get_float32_matmul_precision()
    yield chosen
    torch.set_float32_matmul_precision(before)


def test_a_rank_takes_the_gpu_of_its_number_on_the_node(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    device = setup_device("auto")
    assert device == torch.device("cuda", 1) and two_gpus == [device]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_more_processes_than_gpus_are_refused_on_every_rank(rank, two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="at most the 2 GPUs.*--nproc-per-node 2"):
        setup_device("cuda")
    assert not two_gpus


def test_products_in_float32_are_not_in_tf32(two_gpus, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers have it
    setup_device("cuda")
    assert torch.get_float32_matmul_precision() == "highest"


QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
TRAIN = f"""
import os, sys, torch
seen = []
torch.cuda.is_available = lambda: bool(seen.append(os.environ.get("{QUEUES}")))
from megadpo.commands import main
code = main(["train", *sys.argv[1:]])
print(code, *seen[:1])
"""


def test_kernels_start_in_order_from_the_first_question_for_gpus_on(tmp_path):
    """CUDA reads the variable when it is first asked, which is when megatron-core is imported."""
    config = make_config(tmp_path, make_model(tmp_path / "model"))
    overrides = [f"{MEG}.tensor_model_parallel_size=2", "policy.device=cuda"]
    environment = {key: value for key, value in os.environ.items() if key != QUEUES}
    environment |= {"WORLD_SIZE": "2", "RANK": "0", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", TRAIN, str(config), *overrides]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert done.stdout.split() == ["2", "1"], done.stderr  # there is no GPU, so it refuses


@pytest.mark.parametrize(("tensor_parallel", "given"), [(2, "8"), (1, None)])
def test_the_environments_own_and_a_layer_on_one_gpu_stay_as_they_are(tensor_parallel, given, tmp_path, monkeypatch):
    monkeypatch.setenv(QUEUES, given or "")
    if given is None:
        monkeypatch.delenv(QUEUES)
    config = make_config(tmp_path, make_model(tmp_path / "model"))
    checked_config(str(config), [f"{MEG}.tensor_model_parallel_size={tensor_parallel}"], tensor_parallel)
    assert os.environ.get(QUEUES) == given


def test_a_cpu_run_beside_gpus_is_refused(two_gpus):
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        setup_device("cpu")


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_switches_that_megatron_core_would_stop_at_are_refused(name, two_gpus, monkeypatch):
    """Its assertion, in every model it builds, speaks of an argument that megadpo hasn't."""
    monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match=f"environment variable {name}: .*unset {name}"):
        setup_device("auto")
    monkeypatch.setenv(name, "1")  # as megatron-core leaves it
    setup_device("auto")


def test_what_a_machine_is_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    gpu = machine(torch.device("cuda", 7))
    assert (gpu.device, gpu.compute_capability, gpu.cuda_version) == ("cuda", (8, 9), (12, 8))
    assert machine(torch.device("cpu")).device == machine(torch.device("meta")).device == "cpu"
    assert why_missing("json") is None
    assert why_missing("no_such_package") == "no_such_package is not installed (No module named 'no_such_package')"


def test_without_transformer_engine_the_reason_is_the_import_error():
    if importlib.util.find_spec("transformer_engine") is not None:
        pytest.skip("Transformer Engine is installed")
    reason = "transformer_engine is not installed (No module named 'transformer_engine')"
    assert why_missing("transformer_engine") == reason
