"""Whose AdamW: megatron-core is told, and a run resumes with either, by the step count where each keeps it.

FusedAdam is a stand-in here: torch's operations, Transformer Engine's state (`step` in the groups, which a group without
parameters does not count). The real one against torch's: tests/gpu.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch

from megadpo.optimizer.kinds.adam import Adam
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics

OPT = "policy.megatron_cfg.optimizer"


class FusedAdam(torch.optim.Optimizer):
    """AdamW with Transformer Engine's FusedAdam's arguments and state."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, bias_correction=True, adam_w_mode=True
    ):
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self.adam_w_mode = 1 if adam_w_mode else 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = state["exp_avg_sq"].sqrt().div_((1 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** group["step"]))


def train_with_fused_adam(config, overrides):
    """The command on a CPU, where `auto` takes the stand-in."""
    from megadpo.optimizer.kinds.adam import Adam
    from megadpo.train.command import main

    FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
    stand_in = types.ModuleType("transformer_engine.pytorch.optimizers")
    stand_in.FusedAdam = FusedAdam
    with pytest.MonkeyPatch.context() as patch:
        for part in ("transformer_engine", "transformer_engine.pytorch"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, stand_in.__name__, stand_in)
        patch.setattr(Adam, "choose", lambda self, device_type: ("transformer_engine", "stand-in"))
        return main([config, *overrides])


def run(target, folder, model, *overrides, ranks=1, **sections):
    folder.mkdir(exist_ok=True)
    config = make_config(folder, model, **sections)
    codes = run_distributed(target, ranks, str(config), list(overrides), init_process_group=False)
    assert codes == [0] * ranks


def train_with_torchs(config, overrides):
    from megadpo.train.command import main

    return main([config, *overrides])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("distributed", "options"),
    [("true", []), ("false", []), ("true", ["policy.freeze=[model.embed_tokens.weight, 'model.layers.{0..1}.*']"])],
    ids=["distributed", "plain", "first stage frozen"],
)
def test_a_resume_with_fused_adam_is_the_same_bits(distributed, options, tmp_path):
    """The frozen case: under PP=2 rank 0, whose count the checkpoint holds, has nothing to count steps for."""
    model = make_model(tmp_path / "model")
    ranks = 2 if options else 1
    same = [f"{OPT}.use_distributed_optimizer={distributed}", "checkpointing.save_period=2", "dpo.max_num_steps=4"]
    same += [*options, f"policy.megatron_cfg.pipeline_model_parallel_size={ranks}"]
    run(train_with_fused_adam, tmp_path / "whole", model, *same, ranks=ranks)
    on = {"checkpointing": {"enabled": True}}
    run(train_with_fused_adam, tmp_path / "cut", model, *same, "dpo.max_num_steps=2", ranks=ranks, **on)
    run(train_with_fused_adam, tmp_path / "cut", model, *same, ranks=ranks, **on)
    want, got = (read_metrics(tmp_path / name / "logs") for name in ("whole", "cut"))
    assert [r["train/loss"] for r in got] == [r["train/loss"] for r in want] and len(got) == 4
    run(train_with_torchs, tmp_path / "torchs", model, *same, ranks=ranks)
    for mine, theirs in zip(want, read_metrics(tmp_path / "torchs" / "logs"), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)


@pytest.mark.distributed
def test_the_other_adams_state_is_refused(tmp_path):
    model = make_model(tmp_path / "model")
    on = {"checkpointing": {"enabled": True}}
    run(train_with_torchs, tmp_path / "run", model, "dpo.max_num_steps=1", **on)
    config = make_config(tmp_path / "run", model, **on)
    [code] = run_distributed(train_with_fused_adam, 1, str(config), [], init_process_group=False)
    assert code == 2


def test_megatron_core_is_told():
    from megatron.core import optimizer as mcore
    from megatron.core.optimizer import distrib_optimizer

    from megadpo.optimizer.kinds.adam import use_adam

    use_adam("torch")
    assert mcore.Adam is torch.optim.AdamW and mcore.USING_PYTORCH_OPTIMIZER
    assert not distrib_optimizer.HAVE_APEX_OR_TE and not distrib_optimizer.USING_TE_OPTIMIZER


def test_whose_adam(monkeypatch):
    monkeypatch.setattr("megadpo.parallel.device.why_missing", lambda name: None)
    assert Adam().choose("cpu")[0] == "torch"
    assert Adam().choose("cuda")[0] == "transformer_engine"
    assert Adam(adam_impl="torch").choose("cuda")[0] == "torch"
    monkeypatch.setattr("megadpo.parallel.device.why_missing", lambda name: "not installed")
    assert Adam().choose("cuda") == ("torch", "not installed")
