"""Whole runs on one GPU, by the commands that users type: one rank of NCCL under torchrun.

Bounds, set before any run. Two bfloat16 runs that round differently part slowly: a loss near ln 2 whose logratios are
off by 0.015 sqrt(n) nats at the worst (4 times what tests/gpu/test_layers.py expects), n up to 15 tokens here, beta
0.1, differs by 0.1 x 0.06 / 2 = 3e-3 a pair, and pairs are averaged. So 50 losses may differ by 5e-3 in the mean;
float8's by 1%. Kernels of attention add up their gradients in any order on a GPU, so what follows a resume's first step
is the same to rounding, not to the bit.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
import torch

from tests.gpu.models import make_gpu_model
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics

pytestmark = pytest.mark.gpu
REPOSITORY = Path(__file__).resolve().parents[2]
MEG = "policy.megatron_cfg"
OPT = f"{MEG}.optimizer"


def launch(command, config, *arguments, code=0):
    """`megadpo COMMAND` under torchrun with one process; returns what it printed."""
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    started += ["--nproc-per-node=1", "-m", "megadpo", command, str(config), *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def config_in(folder, model, steps, **policy):
    folder.mkdir()
    sections = {
        "policy": {"precision": "bfloat16", "sequence_packing": {"train_mb_tokens": 256}, **policy},
        "dpo": {"max_num_steps": steps, "max_num_epochs": 20},
    }
    config = make_config(folder, model, pairs=80, **sections)
    return config


def losses(folder):
    return [record["train/loss"] for record in read_metrics(folder / "logs")]


FP8 = {
    "tensorwise": [f"{MEG}.fp8_cfg.enabled=true", f"{MEG}.fp8_cfg.fp8_recipe=tensorwise"],
    "blockwise": [f"{MEG}.fp8_cfg.enabled=true"],
}


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """50 steps: the local layers, Transformer Engine's, and float8 by both recipes."""
    pytest.importorskip("transformer_engine.pytorch")
    folder = tmp_path_factory.mktemp("curves")
    model = make_gpu_model(folder / "model")
    found = {}
    options = {"local": [f"{MEG}.transformer_impl=local"], "transformer_engine": [], **FP8}
    if torch.cuda.get_device_capability() < (9, 0):
        options = {name: options[name] for name in ("local", "transformer_engine")}
    for name, overrides in options.items():
        config = config_in(folder / name, model, 50)
        printed = launch("train", config, f"{OPT}.lr=1e-4", *overrides)
        records = read_metrics(folder / name / "logs")
        found[name] = ([r["train/loss"] for r in records], printed, records)
    return found


@pytest.mark.xdist_group("curves")
def test_the_loss_of_50_steps_is_the_local_layers_within_noise(curves):
    local, te = curves["local"][0], curves["transformer_engine"][0]
    assert "layers       transformer_engine" in curves["transformer_engine"][1]
    assert "FusedAdam" in curves["transformer_engine"][1] and len(te) == len(local) == 50
    assert mean(local[-8:]) < mean(local[:8]) - 1e-3, "it learns something"
    difference = mean(abs(a - b) for a, b in zip(te, local, strict=True))
    print(f"mean difference of 50 losses: {difference:.1e}")
    assert difference < 5e-3


@pytest.mark.xdist_group("curves")
@pytest.mark.parametrize("recipe", FP8)
def test_the_loss_in_float8_is_within_a_hundredth_of_bfloat16s(curves, recipe):
    if recipe not in curves:
        pytest.skip("needs compute capability 9.0")
    want, (got, printed, _) = curves["transformer_engine"][0], curves[recipe]
    assert f"float8 {recipe}" in printed
    off = mean(got) / mean(want) - 1
    speed = [
        mean(r["timing/train/step_time_s"] for r in each[2][5:])
        for each in (curves["transformer_engine"], curves[recipe])
    ]
    print(
        f"{recipe}: mean loss of 50 steps {off:+.2%}; {speed[0] / speed[1]:.2f} x bfloat16's speed on this tiny model"
    )
    assert abs(off) < 0.01


@pytest.mark.xdist_group("curves")
@pytest.mark.parametrize("name", ["local", "transformer_engine", *FP8])
def test_the_first_loss_is_ln_2(curves, name):
    """The reference computes as the policy does, in float8 too."""
    if name not in curves:
        pytest.skip("needs compute capability 9.0")
    assert curves[name][0][0] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_resumed_run_goes_on_where_it_stopped(distributed, tmp_path):
    """The state of whichever AdamW is there: bits of the first loss after the resume, rounding after that."""
    model = make_gpu_model(tmp_path / "model")
    same = [f"{OPT}.use_distributed_optimizer={distributed}", f"{OPT}.lr=1e-4", "checkpointing.save_period=3"]
    whole, cut = config_in(tmp_path / "whole", model, 6), config_in(tmp_path / "cut", model, 6)
    launch("train", whole, *same)
    on = "checkpointing.enabled=true"
    launch("train", cut, *same, on, "dpo.max_num_steps=3")
    before = losses(tmp_path / "cut")
    printed = launch("train", cut, *same, on)
    assert "resuming after step 3" in printed
    want, got = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert got[:3] == before and len(got) == 6
    # The weights that step 4 starts from, and their loss, by themselves: loaded again from the same checkpoint
    (tmp_path / "cut" / "logs" / "metrics.jsonl").unlink()
    for folder in (tmp_path / "cut" / "checkpoints").glob("step_6"):
        folder.rename(tmp_path / "aside")
    launch("train", cut, *same, on)
    again = losses(tmp_path / "cut")
    assert again[0] == got[3], "the first step after a resume is the same bits each time"
    assert got == pytest.approx(want, abs=2e-3) and again == pytest.approx(got[3:], abs=1e-3)


def test_fused_adam_trains_as_torchs_adamw(tmp_path):
    """float32, so that nothing but the optimizer differs: updates of 1e-3, roundings of 6e-8 of them, 5 steps."""
    pytest.importorskip("transformer_engine.pytorch")
    model = make_model(tmp_path / "model")
    found = {}
    for name in ("torch", "transformer_engine"):
        config = config_in(tmp_path / name, model, 5, precision="float32")
        printed = launch("train", config, f"{OPT}.adam_impl={name}", f"{OPT}.use_distributed_optimizer=true")
        assert ("FusedAdam" in printed) == (name == "transformer_engine")
        found[name] = losses(tmp_path / name)
    assert found["torch"] == pytest.approx(found["transformer_engine"], rel=1e-4)


def test_evaluation(tmp_path):
    model = make_gpu_model(tmp_path / "model")
    config = config_in(tmp_path / "run", model, 1)
    launch("evaluate", config, f"dpo.reference.model_name={model}")
    assert len((tmp_path / "run" / "logs" / "pairs-held_out.jsonl").read_text().splitlines()) == 11


def step_without_waits(config, overrides):
    from megadpo.config import load_config
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device
    from megadpo.reference import resident
    from megadpo.train import step
    from megadpo.train.setup import prepare

    cfg = load_config(config, overrides)
    run = prepare(cfg, initialize(Grid.of(cfg), setup_device("auto")))
    batches = run.inputs.train_loader.batches(0)
    run.trainer.step(next(batches))  # kernels are compiled and chosen, memory is cached
    guarded = []

    def without_waits(run_pipeline):
        def call(*args, **kwargs):
            guarded.append(1)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return run_pipeline(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module in (step, resident):
            patch.setattr(module, "run_pipeline", without_waits(module.run_pipeline))
        outcome = run.trainer.step(next(batches))
    return len(guarded), outcome.updated


@pytest.mark.parametrize("kernel", ["varlen", "transformer_engine"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_no_micro_batch_waits_for_the_gpu(kernel, implementation, tmp_path):
    if "transformer_engine" in (kernel, implementation):
        pytest.importorskip("transformer_engine.pytorch")
    config = config_in(tmp_path / "run", make_gpu_model(tmp_path / "model"), 2)
    overrides = [f"policy.attention_kernel={kernel}", f"{MEG}.transformer_impl={implementation}"]
    [found] = run_distributed(step_without_waits, 1, str(config), overrides, init_process_group=False, timeout_s=240)
    assert found == (2, True)


def test_a_profile_names_the_three_largest_costs(tmp_path):
    config = config_in(tmp_path / "run", make_gpu_model(tmp_path / "model"), 10)
    picture = tmp_path / "profile.png"
    printed = launch("profile", config, "--out", str(picture))
    assert picture.stat().st_size > 10_000 and printed.count("%") >= 3
    print(printed)
