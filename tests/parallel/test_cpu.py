"""The CPU redirect: off until asked for, refused where CUDA is, and complete enough for what megatron-core calls."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megadpo.config.problems import ConfigError
from megadpo.parallel import cpu, setup_device

AFTER = """
import torch
before = (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.Tensor.cuda)
import megadpo.parallel
assert (torch.zeros, torch.Tensor.type, torch.cuda.current_device, torch.Tensor.cuda) == before, "patched at import"
from megadpo.parallel.cpu import enable_cpu
enable_cpu(); enable_cpu()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
assert torch.zeros(2, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
assert torch.zeros(2).type(torch.float64).dtype == torch.float64
state = torch.cuda.get_rng_state()
first = torch.rand(3); torch.cuda.set_rng_state(state); assert torch.equal(first, torch.rand(3))
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream()); torch.cuda.Event().record(); torch.cuda.synchronize()
torch.zeros(1).record_stream(torch.cuda.current_stream())
assert torch.zeros(1).cuda().device.type == "cpu"
with torch.device("meta"):
    assert torch.empty(2).device.type == torch.arange(2).device.type == "meta", "transformers loads models so"
"""


def test_off_until_asked_for_then_complete():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", AFTER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_refused_where_cuda_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    zeros = torch.zeros
    with pytest.raises(RuntimeError, match="without CUDA"):
        cpu.enable_cpu()
    assert torch.zeros is zeros
    with pytest.raises(ConfigError, match="policy.device.*cpu"):
        setup_device("cpu")


def test_cuda_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="policy.device.*cuda"):
        setup_device("cuda")
