"""What must hold between the fields of loss, data, kernels, checkpoints and cluster."""

from __future__ import annotations

import pytest

SETS = {"default": "v.jsonl", "my_set": "w.jsonl"}


BROKEN = [
    # changes, where, words of `expected`
    ({"dpo__preference_loss_weight": 0}, "dpo.preference_loss_weight", "positive"),
    ({"dpo__reference__mode": "none"}, "dpo.reference.mode", "resident"),
    ({"dpo__loss_type": "cpo"}, "dpo.reference.mode", "none: dpo.loss_type cpo reads no reference"),
    ({"dpo__reference__cache_dir": "x"}, "dpo.reference.cache_dir", "null with mode resident"),
    (
        {"dpo__loss_type": "simpo", "dpo__reference__mode": "none"},
        "dpo.preference_average_log_probs",
        "true: dpo.loss_type simpo is defined on means",
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
    ({"dpo__f_alpha_divergence_coef": 0.3}, "dpo.f_alpha_divergence_coef", "not set: only"),
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
    ({"data__max_input_seq_length": 2000}, "data.max_input_seq_length", "at most"),
    (
        {"policy__sequence_packing__train_mb_tokens": 1023},
        "policy.sequence_packing.train_mb_tokens",
        "at least 1024",
    ),
    ({"policy__device": "cpu", "policy__attention_kernel": "varlen"}, "policy.attention_kernel", "sdpa"),
    ({"policy__device": "cpu", "policy__logprob_kernel": "triton"}, "policy.logprob_kernel", "torch"),
    ({"data__chosen_key": "x", "data__rejected_key": "x"}, "data.rejected_key", "different"),
    ({"data__prompt_key": "x", "data__rejected_key": "x"}, "data.prompt_key", "different"),
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
        "sft_loss, logps/",
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
        {"checkpointing": {"checkpoint_must_save_by": "00:01:00:00", "save_optimizer": False}},
        "checkpointing.checkpoint_must_save_by",
        "null with checkpointing.save_optimizer false",
    ),
    (
        {"checkpointing__checkpoint_must_save_by": "00:00:00:00"},
        "checkpointing.checkpoint_must_save_by",
        "more than 0",
    ),
    ({"dpo__seed": 2**31}, "dpo.seed", "<= 2147483647"),
    ({"policy__max_total_sequence_length": 2}, "policy.max_total_sequence_length", "at least 3"),
    ({"data__max_input_seq_length": 1}, "data.max_input_seq_length", "at least 3"),
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
    {"dpo__preference_loss_weight": 0, "dpo__sft_loss_weight": 1, "dpo__reference__mode": "none"},
    {"policy__sequence_packing": {"enabled": False, "train_mb_tokens": 10}},
    {"policy__sequence_packing__train_mb_tokens": 500, "data__max_input_seq_length": 250},
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
    {"checkpointing__checkpoint_must_save_by": "00:03:45:00"},
    {"cluster__gpus_per_node": 8, "cluster__num_nodes": 2},
    {"policy__precision": "float32"},
]


@pytest.mark.parametrize("changes", KEPT)
def test_what_the_rules_allow(config, changes):
    assert config(**changes).notes == ()


def test_a_rule_does_not_judge_a_field_that_could_not_be_read(refusals):
    assert list(refusals(policy__precision="half", policy__megatron_cfg__optimizer__bf16=False)) == ["policy.precision"]
    assert list(refusals(data__max_input_seq_length="long")) == ["data.max_input_seq_length"]
