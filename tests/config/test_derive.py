"""Values that follow from others."""

from __future__ import annotations


def test_left_out_values_follow_from_others(config):
    cfg = config(
        dpo__preference_average_log_probs=True,
        dpo__val_batches=-1,
        policy__max_total_sequence_length=700,
        policy__max_grad_norm=None,
        policy__precision="float32",
        policy__logprob_chunk_size=None,
        policy__megatron_cfg__tensor_model_parallel_size=4,
        policy__megatron_cfg__context_parallel_size=2,
        policy__megatron_cfg__sequence_parallel=True,
        policy__megatron_cfg__recompute_granularity=None,
        policy__megatron_cfg__optimizer__weight_decay=0.01,
    )
    megatron = cfg.policy.megatron_cfg
    assert cfg.dpo.sft_average_log_probs is True
    assert cfg.dpo.val_batches == 0
    assert cfg.policy.tokenizer.name == "some/model"
    assert cfg.policy.sequence_packing.train_mb_tokens == 1400
    assert cfg.policy.make_sequence_length_divisible_by == 8
    assert cfg.policy.logprob_chunk_size == 1024
    assert cfg.data.max_input_seq_length == 700
    assert cfg.policy.max_grad_norm == megatron.optimizer.clip_grad == 0.0
    assert (megatron.pipeline_dtype, megatron.optimizer.bf16) == ("float32", False)
    assert megatron.recompute_granularity == "full"
    assert megatron.scheduler.start_weight_decay == megatron.scheduler.end_weight_decay == 0.01


def test_given_values_are_not_overwritten(config):
    cfg = config(
        dpo__preference_average_log_probs=True,
        dpo__sft_average_log_probs=False,
        policy__tokenizer__name="other/tokenizer",
        policy__sequence_packing__train_mb_tokens=9000,
        data__max_input_seq_length=100,
    )
    assert cfg.dpo.sft_average_log_probs is False
    assert cfg.policy.tokenizer.name == "other/tokenizer"
    assert cfg.policy.sequence_packing.train_mb_tokens == 9000
    assert cfg.data.max_input_seq_length == 100
