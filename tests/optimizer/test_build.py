"""Gradient buffers, optimizers and schedules as the config asks for them, and machines that can't give them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megadpo.config.known import Known, Machine
from megadpo.config.reader import keys_of
from megadpo.config.schema import CheckpointingConfig, Config
from megadpo.config.schema_megatron import (
    DistributedDataParallelConfig,
    MegatronConfig,
    OptimizerConfig,
    SchedulerConfig,
)
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.config.variants import OPTIMIZERS
from megadpo.optimizer import build
from tests.helpers.distributed import run_distributed
from tests.model.weights.hf_models import make_hf_folder


def optimizer_config(**optimizer):
    options = {name: optimizer.pop(name) for name in OPTIMIZERS.keys().keys() & optimizer.keys()}
    return OptimizerConfig(**optimizer, options=OPTIMIZERS.defaults() | options)


def policy_of(folder, *, in_fp32=True, device="auto", **optimizer):
    megatron = MegatronConfig(
        optimizer=optimizer_config(**optimizer),
        distributed_data_parallel_config=DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32),
    )
    return PolicyConfig(model_name=folder, tokenizer=TokenizerConfig(name=folder), megatron_cfg=megatron, device=device)


def dtypes_of_buffers(folder):
    from megadpo.config.grid import Grid
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.optimizer.build import wrap_for_training
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(), setup_device("auto"))
    found = []
    for in_fp32 in (True, False):
        policy = policy_of(folder, in_fp32=in_fp32)
        [wrapped] = wrap_for_training(build_model(read_architecture(folder), policy, parallel, frozen=False), policy)
        found += [{(b.param_dtype, b.grad_dtype) for b in wrapped.buffers}]
        assert all(p.main_grad.dtype == b.grad_dtype for b in wrapped.buffers for p in b.params)
    return found


@pytest.mark.distributed
def test_bfloat16_gradients_are_summed_in_float32_where_asked(tmp_path):
    make_hf_folder(tmp_path, "llama")
    [found] = run_distributed(dtypes_of_buffers, 1, str(tmp_path), init_process_group=False)
    assert found == [{(torch.bfloat16, torch.float32)}, {(torch.bfloat16, torch.bfloat16)}]


def refusals(machine, **options):
    """What Adam with these options refuses on a machine, in a run that saves no optimizer."""
    cfg = Config(policy=policy_of("x", **options), checkpointing=CheckpointingConfig(save_optimizer=False))
    return list(OPTIMIZERS.problems(Known(cfg=cfg, machine=machine)))


def test_machines_without_cuda_or_transformer_engine_are_told_why():
    aware = {"use_precision_aware_optimizer": True}
    offload = {**aware, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
    cpu, cuda = Machine(device="cpu"), Machine(device="cuda")
    assert refusals(cpu) == []
    for options in (aware, offload):
        [problem] = refusals(cpu, **options)
        assert "without CUDA" in problem.expected and problem.where.endswith("use_precision_aware_optimizer")
    bare = Machine(device="cuda", why_missing=lambda _: "Transformer Engine is not installed")
    [problem] = refusals(bare, **aware)
    assert "Transformer Engine" in problem.expected
    assert refusals(bare, **offload) == []  # HybridDeviceOptimizer does without it
    [problem] = refusals(bare, adam_impl="transformer_engine")
    assert "Transformer Engine is not installed" in problem.expected
    assert refusals(cuda, **aware) == []


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_every_option_of_the_optimizer_reaches_megatron_core(name, monkeypatch):
    groups = [{"fused": None, "lr": 1.0}, {"lr": 1.0}]

    def get_optimizer(config, chunks, **_):
        return SimpleNamespace(config=config, chunks=chunks, param_groups=groups)

    monkeypatch.setattr(build, "get_megatron_optimizer", get_optimizer)
    common = {"lr": 3e-4, "min_lr": 2e-5, "weight_decay": 0.03, "use_distributed_optimizer": False, "optimizer": name}
    own = {
        "sgd": {"sgd_momentum": 0.6},
        "adam": {
            "adam_beta1": 0.8, "adam_beta2": 0.7, "adam_eps": 1e-6, "exp_avg_dtype": "bfloat16",
            "use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5,
            "overlap_cpu_optimizer_d2h_h2d": True, "exp_avg_sq_dtype": "float32",
        },
    }  # fmt: skip
    rest = {"bf16", "clip_grad", "adam_impl"}
    assert common.keys() | own["sgd"].keys() | own["adam"].keys() | rest == keys_of(OptimizerConfig).keys()
    options = common | own[name]
    policy = dataclasses.replace(policy_of("x", **options), max_grad_norm=0.7, precision="float32")
    monkeypatch.setattr("megatron.core.optimizer.OptimizerConfig.__post_init__", lambda self: None)
    built = build.build_optimizer(["chunk"], policy, torch.device("cpu"))
    config = built.config
    assert built.chunks == ["chunk"]
    assert groups == [{"fused": True, "lr": 1.0}, {"lr": 1.0}]  # on a CPU, where the optimizer has it
    dtypes = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.float32}
    wanted = options | (dtypes if name == "adam" else {})
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (config.clip_grad, config.bf16, config.params_dtype) == (0.7, False, torch.float32)


def schedule_of(steps, *, lr=1.0, **schedule):
    megatron = MegatronConfig(optimizer=OptimizerConfig(lr=lr, min_lr=0.2), scheduler=SchedulerConfig(**schedule))
    policy = dataclasses.replace(policy_of("x"), megatron_cfg=megatron)
    group = {"lr": None, "weight_decay": None, "wd_mult": 1.0, "lr_mult": 1.0, "params": []}
    return group, build.build_scheduler(SimpleNamespace(param_groups=[group]), policy, steps)


@pytest.mark.parametrize(
    ("schedule", "steps", "rates", "decays"),
    [
        ({}, 4, [1.0, 1.0, 1.0, 1.0, 1.0], [0.1] * 5),
        ({"lr_warmup_iters": 2, "lr_warmup_init": 0.2}, 4, [0.2, 0.6, 1.0, 1.0, 1.0], [0.1] * 5),
        ({"lr_decay_style": "linear"}, 4, [1.0, 0.8, 0.6, 0.4, 0.2], [0.1] * 5),
        ({"lr_decay_style": "linear", "lr_decay_iters": 2}, 4, [1.0, 0.6, 0.2, 0.2, 0.2], [0.1] * 5),
        ({"lr_decay_style": "cosine", "lr_warmup_iters": 1}, 3, [0.0, 1.0, 0.6, 0.2], [0.1] * 4),
        ({"weight_decay_incr_style": "linear", "end_weight_decay": 0.3}, 4, [1.0] * 5, [0.1, 0.15, 0.2, 0.25, 0.3]),
    ],
)
def test_rate_and_weight_decay_of_each_step(schedule, steps, rates, decays):
    group, scheduler = schedule_of(steps, **schedule)
    found = []
    for _ in rates:
        found.append((group["lr"], group["weight_decay"]))
        scheduler.step(increment=1)
    assert found == [pytest.approx(pair) for pair in zip(rates, decays, strict=True)]


def test_a_resumed_schedule_goes_on_counting_and_follows_its_own_config():
    _, before = schedule_of(4, lr_decay_style="linear")
    before.step(increment=2)
    group, after = schedule_of(8, lr=0.6, lr_decay_style="linear")
    after.load_state_dict(before.state_dict())
    assert after.num_steps == 2 and group["lr"] == pytest.approx(0.6 - 0.4 * 2 / 8)
