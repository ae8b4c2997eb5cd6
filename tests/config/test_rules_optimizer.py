"""What must hold between the fields of optimizer, schedule and number formats."""

from __future__ import annotations

import pytest

MEG = "policy__megatron_cfg__"
OPT = MEG + "optimizer__"
SCHED = MEG + "scheduler__"
AWARE, SAVE = {OPT + "use_precision_aware_optimizer": True}, "checkpointing__save_optimizer"
AWARE_FIELD = "policy.megatron_cfg.optimizer.use_precision_aware_optimizer"


BROKEN = [
    # changes, where, words of `expected`
    ({OPT + "bf16": False}, "policy.megatron_cfg.optimizer.bf16", "policy.precision"),
    ({OPT + "bf16": True, "policy__precision": "float32"}, "policy.megatron_cfg.optimizer.bf16", "policy.precision"),
    ({MEG + "pipeline_dtype": "float32"}, "policy.megatron_cfg.pipeline_dtype", "policy.precision"),
    ({OPT + "clip_grad": 2.0}, "policy.megatron_cfg.optimizer.clip_grad", "policy.max_grad_norm"),
    ({**AWARE, OPT + "exp_avg_dtype": "bfloat16"}, AWARE_FIELD, "resuming from this state has not been tested"),
    ({OPT + "optimizer": "sgd"}, "policy.megatron_cfg.optimizer.use_distributed_optimizer", "Adam"),
    ({**AWARE, SAVE: False, OPT + "use_distributed_optimizer": False}, AWARE_FIELD, "use_distributed_optimizer"),
    ({**AWARE, SAVE: False, "policy__device": "cpu"}, AWARE_FIELD, "CUDA"),
    ({OPT + "exp_avg_dtype": "bfloat16"}, "policy.megatron_cfg.optimizer.exp_avg_dtype", "float32"),
    ({OPT + "exp_avg_sq_dtype": "bfloat16"}, "policy.megatron_cfg.optimizer.exp_avg_sq_dtype", "float32"),
    (
        {OPT + "optimizer_cpu_offload": True, OPT + "optimizer_offload_fraction": 0.5},
        "policy.megatron_cfg.optimizer.optimizer_cpu_offload",
        "use_precision_aware_optimizer",
    ),
    (
        {OPT + "optimizer_offload_fraction": 0.5},
        "policy.megatron_cfg.optimizer.optimizer_offload_fraction",
        "0 without",
    ),
    (
        {**AWARE, SAVE: False, OPT + "optimizer_cpu_offload": True},
        "policy.megatron_cfg.optimizer.optimizer_offload_fraction",
        "more than 0",
    ),
    (
        {OPT + "overlap_cpu_optimizer_d2h_h2d": True},
        "policy.megatron_cfg.optimizer.overlap_cpu_optimizer_d2h_h2d",
        "false without",
    ),
    ({OPT + "min_lr": 1e-3, SCHED + "lr_decay_style": "linear"}, "policy.megatron_cfg.optimizer.min_lr", "at most"),
    (
        {SCHED + "lr_warmup_init": 1e-3, SCHED + "lr_warmup_iters": 2},
        "policy.megatron_cfg.scheduler.lr_warmup_init",
        "at most",
    ),
    (
        {SCHED + "lr_decay_style": "linear", SCHED + "lr_decay_iters": 5, SCHED + "lr_warmup_iters": 5},
        "policy.megatron_cfg.scheduler.lr_warmup_iters",
        "lr_decay_iters (5)",
    ),
    (
        {SCHED + "lr_decay_style": "cosine", SCHED + "lr_warmup_iters": 9, "dpo__max_num_steps": 8},
        "policy.megatron_cfg.scheduler.lr_warmup_iters",
        "dpo.max_num_steps (8)",
    ),
    ({SCHED + "end_weight_decay": 0.2}, "policy.megatron_cfg.scheduler.end_weight_decay", "constant"),
    ({SCHED + "start_weight_decay": 0.0}, "policy.megatron_cfg.scheduler.start_weight_decay", "constant"),
    (
        {SCHED + "weight_decay_incr_style": "linear", SCHED + "end_weight_decay": 0.05},
        "policy.megatron_cfg.scheduler.end_weight_decay",
        "at least start_weight_decay",
    ),
]


@pytest.mark.parametrize(("changes", "where", "expected"), BROKEN)
def test_broken_rule(refusals, changes, where, expected):
    found = refusals(**changes)
    assert list(found) == [where]
    assert expected in found[where].expected
    assert found[where].fix


KEPT = [
    {
        **AWARE,
        SAVE: False,
        OPT + "exp_avg_dtype": "bfloat16",
        OPT + "optimizer_cpu_offload": True,
        OPT + "optimizer_offload_fraction": 1.0,
        OPT + "overlap_cpu_optimizer_d2h_h2d": True,
    },
    {SCHED + "weight_decay_incr_style": "cosine", SCHED + "start_weight_decay": 0.0, SCHED + "end_weight_decay": 0.3},
    {SCHED + "lr_warmup_iters": 50, "dpo__max_num_steps": 5},
    {
        **AWARE,
        SAVE: False,
        OPT + "optimizer_cpu_offload": True,
        OPT + "optimizer_offload_fraction": 1.0,
        OPT + "adam_impl": "torch",
    },
    {"policy__device": "cpu", OPT + "adam_impl": "torch"},
    {SCHED + "lr_decay_style": "cosine", SCHED + "lr_warmup_iters": 4, "dpo__max_num_steps": 5},
    {OPT + "optimizer": "sgd", OPT + "use_distributed_optimizer": False},
]


@pytest.mark.parametrize("changes", KEPT)
def test_what_the_rules_allow(config, changes):
    assert config(**changes).notes == ()
