"""What must hold between fields."""

from __future__ import annotations

import pytest

MEG = "policy__megatron_cfg__"
OPT = MEG + "optimizer__"
SCHED = MEG + "scheduler__"
DDP = MEG + "distributed_data_parallel_config__"
VPP = MEG + "virtual_pipeline_model_parallel_size"
SELECTIVE = {MEG + "activation_checkpointing": True, MEG + "recompute_granularity": "selective"}
AWARE, SAVE = {OPT + "use_precision_aware_optimizer": True}, "checkpointing__save_optimizer"
AWARE_FIELD = "policy.megatron_cfg.optimizer.use_precision_aware_optimizer"
SETS = {"default": "v.jsonl", "my_set": "w.jsonl"}

BROKEN = [
    # changes, where, words of `expected`
    ({OPT + "bf16": False}, "policy.megatron_cfg.optimizer.bf16", "policy.precision"),
    ({OPT + "bf16": True, "policy__precision": "float32"}, "policy.megatron_cfg.optimizer.bf16", "policy.precision"),
    ({MEG + "pipeline_dtype": "float32"}, "policy.megatron_cfg.pipeline_dtype", "policy.precision"),
    ({OPT + "clip_grad": 2.0}, "policy.megatron_cfg.optimizer.clip_grad", "policy.max_grad_norm"),
    ({"dpo__preference_loss_weight": 0}, "dpo.preference_loss_weight", "positive"),
    ({"dpo__reference__mode": "none"}, "dpo.reference.mode", "resident"),
    ({"dpo__loss_type": "cpo"}, "dpo.reference.mode", "none with dpo.loss_type cpo"),
    ({"dpo__reference__cache_dir": "x"}, "dpo.reference.cache_dir", "null with mode resident"),
    (
        {"dpo__loss_type": "simpo", "dpo__reference__mode": "none"},
        "dpo.preference_average_log_probs",
        "true with dpo.loss_type simpo",
    ),
    ({"dpo__loss_type": "exo_pair"}, "dpo.label_smoothing", "more than 0"),
    ({"dpo__loss_type": "hinge", "dpo__label_smoothing": 0.1}, "dpo.label_smoothing", "sigmoid, exo_pair, robust, cpo"),
    ({"dpo__simpo_gamma": 1.0}, "dpo.simpo_gamma", "read by simpo"),
    ({"dpo__discopop_tau": 0.1}, "dpo.discopop_tau", "read by discopop"),
    (
        {"dpo__loss_type": "bco_pair", "dpo__f_divergence_type": "js_divergence"},
        "dpo.f_divergence_type",
        "nothing with dpo.loss_type bco_pair",
    ),
    ({"dpo__f_alpha_divergence_coef": 0.3}, "dpo.f_alpha_divergence_coef", "nothing without"),
    (
        {"dpo__f_divergence_type": "alpha_divergence", "dpo__f_alpha_divergence_coef": 1},
        "dpo.f_alpha_divergence_coef",
        "reverse_kl",
    ),
    (
        {
            "dpo__reference": {"mode": "none", "model_name": "x"},
            "dpo__preference_loss_weight": 0,
            "dpo__sft_loss_weight": 1,
        },
        "dpo.reference.model_name",
        "null",
    ),
    ({MEG + "sequence_parallel": True}, "policy.megatron_cfg.sequence_parallel", "tensor_model_parallel_size 1"),
    (
        {
            MEG + "sequence_parallel": True,
            MEG + "tensor_model_parallel_size": 4,
            "policy__make_sequence_length_divisible_by": 6,
        },
        "policy.make_sequence_length_divisible_by",
        "multiple of tensor_model_parallel_size (4)",
    ),
    (
        {MEG + "context_parallel_size": 4, "policy__make_sequence_length_divisible_by": 2},
        "policy.make_sequence_length_divisible_by",
        "multiple of context_parallel_size (4)",
    ),
    (
        {
            MEG + "context_parallel_size": 2,
            MEG + "sequence_parallel": True,
            MEG + "tensor_model_parallel_size": 2,
            "policy__make_sequence_length_divisible_by": 2,
        },
        "policy.make_sequence_length_divisible_by",
        "multiple of context_parallel_size (2) x tensor_model_parallel_size (2)",
    ),
    (
        {
            MEG + "context_parallel_size": 1024,
            "policy__max_total_sequence_length": 512,
            "policy__sequence_packing__train_mb_tokens": 1000,
        },
        "policy.sequence_packing.train_mb_tokens",
        "at least 1024",
    ),
    ({MEG + "num_layers_in_first_pipeline_stage": 3}, "policy.megatron_cfg.num_layers_in_first_pipeline_stage", "null"),
    ({MEG + "num_layers_in_last_pipeline_stage": 3}, "policy.megatron_cfg.num_layers_in_last_pipeline_stage", "null"),
    (
        {DDP + "overlap_param_gather": True},
        "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
        "overlap_grad_reduce",
    ),
    (
        {
            DDP + "overlap_param_gather": True,
            DDP + "overlap_grad_reduce": True,
            OPT + "use_distributed_optimizer": False,
        },
        "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
        "use_distributed_optimizer",
    ),
    ({VPP: 2}, "policy.megatron_cfg.virtual_pipeline_model_parallel_size", "1 with pipeline_model_parallel_size 1"),
    (AWARE, AWARE_FIELD, "resumes is not proved"),
    ({**SELECTIVE, MEG + "recompute_method": "block"}, "policy.megatron_cfg.recompute_method", "no use"),
    ({**SELECTIVE, MEG + "recompute_num_layers": 2}, "policy.megatron_cfg.recompute_num_layers", "no use"),
    (
        {MEG + "activation_checkpointing": True, MEG + "recompute_modules": ["mlp"]},
        "policy.megatron_cfg.recompute_modules",
        "no use",
    ),
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
    ({OPT + "min_lr": 1e-3}, "policy.megatron_cfg.optimizer.min_lr", "at most"),
    ({SCHED + "lr_warmup_init": 1e-3}, "policy.megatron_cfg.scheduler.lr_warmup_init", "at most"),
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
    ({"data__max_input_seq_length": 2000}, "data.max_input_seq_length", "at most"),
    (
        {"policy__sequence_packing__train_mb_tokens": 1023},
        "policy.sequence_packing.train_mb_tokens",
        "at least 1024",
    ),
    ({"policy__device": "cpu", "policy__attention_kernel": "varlen"}, "policy.attention_kernel", "sdpa"),
    ({"policy__device": "cpu", "policy__logprob_kernel": "triton"}, "policy.logprob_kernel", "torch"),
    ({"data__chosen_key": "x", "data__rejected_key": "x"}, "data.rejected_key", "different"),
    ({"data__val_data_paths": {"a/b": "v.jsonl"}}, "data.val_data_paths", "letters"),
    (
        {"checkpointing__metric_name": "validation-gone_loss", "data__val_data_paths": SETS},
        "checkpointing.metric_name",
        "my_set",
    ),
    ({"checkpointing__metric_name": "validation-default_loss"}, "checkpointing.metric_name", "null"),
    (
        {"checkpointing__metric_name": "validation-default_bleu", "data__val_data_paths": SETS},
        "checkpointing.metric_name",
        "rewards/accuracies",
    ),
    (
        {"checkpointing__metric_name": "validation-default_loss", "data__val_data_paths": SETS, "dpo__val_period": 0},
        "checkpointing.metric_name",
        "val_period",
    ),
    (
        {"checkpointing__metric_name": "validation-default_accuracy", "data__val_data_paths": SETS},
        "checkpointing.higher_is_better",
        "true",
    ),
    (
        {
            "checkpointing": {"metric_name": "train:accuracy", "higher_is_better": True},
            "dpo": {"preference_loss_weight": 0, "sft_loss_weight": 1, "reference": {"mode": "none"}},
        },
        "checkpointing.metric_name",
        "sft_loss and logps/",
    ),
    (
        {"checkpointing__metric_name": "train:loss", "checkpointing__higher_is_better": True},
        "checkpointing.higher_is_better",
        "false",
    ),
    (
        {"checkpointing": {"checkpoint_must_save_by": "00:01:00:00", "enabled": False}},
        "checkpointing.checkpoint_must_save_by",
        "null with checkpointing.enabled false",
    ),
    (
        {"checkpointing__checkpoint_must_save_by": "00:00:00:00"},
        "checkpointing.checkpoint_must_save_by",
        "more than 0",
    ),
    ({"dpo__seed": 2**31}, "dpo.seed", "<= 2147483647"),
    ({"policy__max_total_sequence_length": 2}, "policy.max_total_sequence_length", "at least 3"),
    ({"data__max_input_seq_length": 1}, "data.max_input_seq_length", "at least 3"),
    ({**SELECTIVE, MEG + "recompute_modules": []}, "policy.megatron_cfg.recompute_modules", "what to recompute"),
    ({"checkpointing__checkpoint_must_save_by": "3h"}, "checkpointing.checkpoint_must_save_by", "DD:HH:MM:SS"),
    ({"cluster__gpus_per_node": 8}, "cluster.num_nodes", "beside"),
    ({"cluster__num_nodes": 8}, "cluster.gpus_per_node", "beside"),
]


@pytest.mark.parametrize(("changes", "where", "expected"), BROKEN)
def test_broken_rule(refusals, changes, where, expected):
    found = refusals(**changes)
    assert list(found) == [where]
    assert expected in found[where].expected
    assert found[where].fix


KEPT = [
    {MEG + "pipeline_model_parallel_size": 2, VPP: 2},
    {
        **AWARE,
        SAVE: False,
        OPT + "exp_avg_dtype": "bfloat16",
        OPT + "optimizer_cpu_offload": True,
        OPT + "optimizer_offload_fraction": 1.0,
        OPT + "overlap_cpu_optimizer_d2h_h2d": True,
    },
    {MEG + "virtual_pipeline_model_parallel_size": None, "policy__freeze": None},
    {"dpo__preference_loss_weight": 0, "dpo__sft_loss_weight": 1, "dpo__reference__mode": "none"},
    {MEG + "sequence_parallel": True, MEG + "tensor_model_parallel_size": 2},
    {MEG + "pipeline_model_parallel_size": 2, MEG + "num_layers_in_first_pipeline_stage": 3},
    {DDP + "overlap_param_gather": True, DDP + "overlap_grad_reduce": True},
    {SCHED + "weight_decay_incr_style": "cosine", SCHED + "start_weight_decay": 0.0, SCHED + "end_weight_decay": 0.3},
    {SCHED + "lr_warmup_iters": 50, "dpo__max_num_steps": 5},
    {"policy__sequence_packing": {"enabled": False, "train_mb_tokens": 10}},
    {"policy__sequence_packing__train_mb_tokens": 500, "data__max_input_seq_length": 250},
    {
        **AWARE,
        SAVE: False,
        OPT + "optimizer_cpu_offload": True,
        OPT + "optimizer_offload_fraction": 1.0,
        OPT + "adam_impl": "torch",
    },
    {"policy__device": "cpu", OPT + "adam_impl": "torch"},
    {"policy__device": "cuda", "policy__attention_kernel": "transformer_engine"},
    {"checkpointing__metric_name": "val:validation-my_set_loss", "data__val_data_paths": SETS},
    {"checkpointing__metric_name": "val_loss", "checkpointing__enabled": False},
    {"checkpointing__metric_name": "train:accuracy", "checkpointing__higher_is_better": True},
    {
        "checkpointing": {"metric_name": "train:accuracy", "higher_is_better": True},
        "dpo": {"loss_type": "cpo", "reference": {"mode": "none"}},
    },
    {"checkpointing__metric_name": "train:loss", "data__val_data_paths": SETS, "dpo__val_period": 0},
    {"dpo__loss_type": "exo_pair", "dpo__label_smoothing": 0.01},
    {"dpo__f_divergence_type": "alpha_divergence", "dpo__f_alpha_divergence_coef": 0.3},
    {SCHED + "lr_decay_style": "cosine", SCHED + "lr_warmup_iters": 4, "dpo__max_num_steps": 5},
    {"checkpointing__checkpoint_must_save_by": "00:03:45:00"},
    {"cluster__gpus_per_node": 8, "cluster__num_nodes": 2},
    {"policy__precision": "float32"},
    {**SELECTIVE, MEG + "recompute_modules": ["mlp"]},
    {MEG + "activation_checkpointing": True, MEG + "recompute_method": "block", MEG + "recompute_num_layers": 2},
    {MEG + "recompute_modules": ["mlp"], MEG + "recompute_method": "block"},
    {OPT + "optimizer": "sgd", OPT + "use_distributed_optimizer": False},
]


@pytest.mark.parametrize("changes", KEPT)
def test_what_the_rules_allow(config, changes):
    assert config(**changes).notes == ()


def test_a_rule_does_not_judge_a_field_that_could_not_be_read(refusals):
    assert list(refusals(policy__precision="half", policy__megatron_cfg__optimizer__bf16=False)) == ["policy.precision"]
    assert list(refusals(data__max_input_seq_length="long")) == ["data.max_input_seq_length"]
