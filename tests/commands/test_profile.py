"""The profiler's command on a CPU: the largest costs in words, a picture, a timeline."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megadpo.commands import main
from megadpo.train.profile import summary
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model


def profiled(arguments):
    """Target for run_distributed: the exit code, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        return main(["profile", *arguments]), printed.getvalue()


def command(*arguments):
    [result] = run_distributed(profiled, 1, list(map(str, arguments)), init_process_group=False, timeout_s=250)
    return result


@pytest.mark.distributed
def test_it_names_the_three_largest_costs(tmp_path):
    config = make_config(tmp_path, make_model(tmp_path / "model"), pairs=16)  # two batches an epoch
    picture, trace = tmp_path / "profile.png", tmp_path / "trace.json.gz"
    code, printed = command(config, "--out", picture, "--trace", trace, "--warmup", 1, "--steps", 2)
    lines = printed.splitlines()
    assert code == 0 and "ms a step" in lines[0] and [line[:2] for line in lines[1:]] == ["1.", "2.", "3."]
    assert picture.read_bytes().startswith(b"\x89PNG")
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]
    assert not (tmp_path / "logs").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.distributed
def test_a_cached_reference_is_computed_for_the_recorded_steps_only(tmp_path):
    config = make_config(tmp_path, make_model(tmp_path / "model"), dpo={"max_num_steps": None})
    cached = ["dpo.reference.mode=cached", f"dpo.reference.cache_dir={tmp_path / 'logps'}"]
    code, printed = command(config, *cached, "--out", tmp_path / "profile.png", "--warmup", 1, "--steps", 1)
    assert code == 0, printed
    (file,) = (tmp_path / "logps").iterdir()
    assert (~np.isnan(load_file(file)["logps"])).sum() == 32
    assert not (tmp_path / "checkpoints").exists()


def test_what_it_cannot_do_is_refused_together(tmp_path, capsys):
    config = make_config(tmp_path, make_model(tmp_path / "model"))
    assert main(["profile", str(config), "--out", str(tmp_path / "nowhere" / "x.png"), "--steps", "0"]) == 2
    told = capsys.readouterr().err
    assert "--out" in told and "--steps" in told


def test_without_matplotlib_it_is_refused_by_name(tmp_path, monkeypatch, capsys):
    config = make_config(tmp_path, make_model(tmp_path / "model"))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(["profile", str(config), "--out", str(tmp_path / "x.png")]) == 2
    assert "pip install 'megadpo[report]'" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_costs_are_own_times_of_one_device(device):
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(key, kind, microseconds, count, annotation=False):
        times = {"self_cpu_time_total": 0.0, "self_device_time_total": 0.0}
        times["self_cpu_time_total" if kind == cpu else "self_device_time_total"] = microseconds
        return SimpleNamespace(key=key, device_type=kind, count=count, is_user_annotation=annotation, **times)

    events = [
        event("add", cpu, 100.0, 2),
        event("mm", cpu, 300.0, 4),
        event("gemm", cuda, 900.0, 4),
        event("copy", cuda, 0.0, 4),
        event("Optimizer.step", cuda, 950.0, 1, annotation=True),
    ]
    found = summary(events, device, steps=2, seconds=1e-3)
    names, shares = [c.name for c in found.costs], [c.share for c in found.costs]
    assert (names, shares) == ((["mm", "add"], [0.75, 0.25]) if device == "cpu" else (["gemm"], [1.0]))
    assert found.busy == pytest.approx(0.4 if device == "cpu" else 0.9) and found.step_ms == pytest.approx(0.5)
    assert found.costs[0].calls_per_step == 2 and found.costs[0].ms_per_step == pytest.approx(
        found.costs[0].share * found.busy * 0.5
    )
