"""Whose AdamW: megatron-core is told, and a run resumes with either, by the step count where each keeps it.

FusedAdam is a stand-in here: torch's operations, Transformer Engine's state (`step` in the groups, which a group without
parameters does not count). The real one against torch's: tests/gpu.
"""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from megadpo.optimizer import slices
from megadpo.optimizer.kinds.adam import Adam
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train

OPT = "policy.megatron_cfg.optimizer"


class FusedAdam(torch.optim.Optimizer):
    """AdamW with Transformer Engine's FusedAdam's arguments and state. Moments that aren't float32 are copied into float32,
    and a group's copies kept to its end, as before 2.13."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
    ):
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        assert not capturable
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        self.copied_at_once = []

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            copies = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                for name, dtype in self.dtypes.items():
                    state.setdefault(name, torch.zeros_like(p, dtype=dtype))
                first, second = (state[name].float() for name in self.dtypes)
                copies += [
                    (state[n], x) for n, x in zip(self.dtypes, (first, second), strict=True) if x is not state[n]
                ]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                first.lerp_(p.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = second.sqrt().div_((1 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
                p.addcdiv_(first, root, value=-group["lr"] / (1 - beta1 ** group["step"]))
            for kept, copy in copies:
                kept.copy_(copy)
            self.copied_at_once.append(sum(copy.nbytes for _, copy in copies))


def install_stand_in(patch, version="2.11.0"):
    """Transformer Engine of this version, which has FusedAdam and nothing else."""
    import megatron.core.optimizer  # noqa: F401  before there is a stand-in for it to find

    FusedAdam.__module__ = "transformer_engine.pytorch.optimizers.fused_adam"
    for part in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.optimizers"):
        patch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules["transformer_engine"].__version__ = version
    sys.modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam
    patch.setattr("megatron.core.utils._te_version", None)


def train_with_fused_adam(config, overrides):
    """The command on a CPU, where `auto` takes the stand-in."""
    from megadpo.optimizer.kinds.adam import Adam

    with pytest.MonkeyPatch.context() as patch:
        install_stand_in(patch)
        patch.setattr(Adam, "choose", lambda self, device_type: ("transformer_engine", "stand-in"))
        return train(config, overrides)


def train_in_slices(config, overrides):
    """The same, a few parameters at a time."""
    from megadpo.optimizer import slices
    from megadpo.optimizer.kinds.adam import Adam

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adam, "copied_bytes", 8)
        patch.setattr(slices, "SLICE_BYTES", 8 * 20_000)
        return train_with_fused_adam(config, overrides)


def run(target, folder, model, *overrides, ranks=1, **sections):
    folder.mkdir(exist_ok=True)
    config = make_config(folder, model, **sections)
    codes = run_distributed(target, ranks, str(config), list(overrides), init_process_group=False)
    assert codes == [0] * ranks


def train_with_torchs(config, overrides):
    return train(config, overrides)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("distributed", "options"),
    [("true", []), ("false", []), ("true", ["policy.freeze=[model.embed_tokens.weight, 'model.layers.{0..1}.*']"])],
    ids=["distributed", "plain", "first stage frozen"],
)
def test_a_resume_with_fused_adam_is_the_same_bits(distributed, options, tmp_path):
    """In slices and whole. The frozen case: under PP=2 rank 0, whose count the checkpoint holds, has nothing to count steps
    for."""
    model = make_model(tmp_path / "model")
    ranks = 2 if options else 1
    same = [f"{OPT}.use_distributed_optimizer={distributed}", "checkpointing.save_period=2", "dpo.max_num_steps=4"]
    same += [*options, f"policy.megatron_cfg.pipeline_model_parallel_size={ranks}"]
    run(train_with_fused_adam, tmp_path / "whole", model, *same, ranks=ranks)
    on = {"checkpointing": {"enabled": True}}
    run(train_in_slices, tmp_path / "cut", model, *same, "dpo.max_num_steps=2", ranks=ranks, **on)
    run(train_in_slices, tmp_path / "cut", model, *same, ranks=ranks, **on)
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


SIZES = [[40, 100, 30, 30, 250, 10], [7], []]


def updated(optimizer_class, steps=3):
    """Parameters, moments and step counts after some steps from seeded gradients, and what was copied at a time."""
    generator = torch.Generator().manual_seed(0)
    groups = [[torch.randn(n, generator=generator) for n in sizes] for sizes in SIZES]
    narrow = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: an empty group
        optimizer = optimizer_class([{"params": params, "weight_decay": 0.1} for params in groups], **narrow)
    every = [one for params in groups for one in params]
    for _ in range(steps):
        for one in every:
            one.grad = torch.randn(one.shape, generator=generator)
        optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == groups
    moments = [optimizer.state[one][name] for one in every for name in ("exp_avg", "exp_avg_sq")]
    return every + moments, [group.get("step") for group in optimizer.param_groups], optimizer.copied_at_once


def test_slices_give_the_same_bits_and_copy_no_more_than_their_size(monkeypatch):
    install_stand_in(monkeypatch)
    monkeypatch.setattr(slices, "SLICE_BYTES", 8 * 130)
    want, steps, copied = updated(FusedAdam)
    assert copied == [8 * 460, 8 * 7] * 3
    sliced = slices.in_slices(FusedAdam, copied_bytes=8)
    got, counted, copied = updated(sliced)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert counted == steps == [3, 3, None]
    # 40; 100 and 30; 30; 250 alone; 10; the second group
    assert copied == [8 * n for n in (40, 130, 30, 250, 10, 7)] * 3
    assert sliced.__module__.startswith("transformer_engine") and sliced.__name__ == "FusedAdam"  # for the banner


@pytest.mark.parametrize(("version", "copied_bytes", "is_sliced"), [
    ("2.11.0", 8, True), ("2.12.1", 4, True), ("2.13.0", 8, False), ("3.0", 8, False), ("2.11.0", 0, False),
])  # fmt: skip
def test_only_what_copies_goes_in_slices(version, copied_bytes, is_sliced, monkeypatch):
    install_stand_in(monkeypatch, version)
    assert (slices.in_slices(FusedAdam, copied_bytes) is not FusedAdam) == is_sliced
    narrow = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bfloat16"}
    assert (Adam().copied_bytes, Adam(**narrow).copied_bytes) == (0, 4)
    assert Adam(**narrow, exp_avg_sq_dtype="bfloat16").copied_bytes == 8


def test_the_most_that_slices_copy():
    """8B parameters, the largest 525M: a copy of that one, and half of a moment's beside it; of small ones, a slice."""
    assert slices.most_copied(8, 8_030_000_000, 525_336_576) == 10 * 525_336_576
    assert slices.most_copied(8, 8_030_000_000, 1_000_000) == 500_000_000 + 2_000_000
    assert slices.most_copied(8, 1_000, 1_000) == 10_000
    assert slices.most_copied(0, 1_000, 1_000) == 0


def test_whose_adam(monkeypatch):
    monkeypatch.setattr("megadpo.parallel.device.why_missing", lambda name: None)
    assert Adam().choose("cpu")[0] == "torch"
    assert Adam().choose("cuda")[0] == "transformer_engine"
    assert Adam(adam_impl="torch").choose("cuda")[0] == "torch"
    monkeypatch.setattr("megadpo.parallel.device.why_missing", lambda name: "not installed")
    assert Adam().choose("cuda") == ("torch", "not installed")
