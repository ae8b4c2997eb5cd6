"""Types, ranges, unknown keys, and derived values."""

from __future__ import annotations

import pytest

from megadpo.config import EXIT_REFUSED, ConfigError, DataError, Problem, UserError, build_config


def test_smallest_config_has_nemo_rls_defaults(config):
    cfg = config()
    assert (cfg.dpo.val_period, cfg.dpo.val_batches, cfg.dpo.reference_policy_kl_penalty) == (25, 8, 0.05)
    assert (cfg.policy.train_global_batch_size, cfg.policy.precision) == (128, "bfloat16")
    assert cfg.policy.megatron_cfg.optimizer.lr == 5e-6
    assert cfg.policy.sequence_packing.train_mb_tokens == 2 * cfg.policy.max_total_sequence_length
    assert cfg.policy.make_sequence_length_divisible_by == 1
    assert cfg.notes == ()


BAD_VALUES = [
    # path, value, words of `expected`
    ("dpo__max_num_epochs", True, "whole number"),
    ("dpo__max_num_epochs", 1.5, "whole number"),
    ("dpo__max_num_epochs", "3", "whole number"),
    ("dpo__max_num_epochs", 0, ">= 1"),
    ("dpo__max_num_epochs", None, "whole number"),
    ("dpo__max_num_steps", -1, "or null"),
    ("dpo__val_at_start", 1, "true or false"),
    ("dpo__val_at_start", "yes", "true or false"),
    ("dpo__reference_policy_kl_penalty", 0, "> 0"),
    ("dpo__reference_policy_kl_penalty", True, "a number"),
    ("dpo__reference_policy_kl_penalty", "strong", "a number"),
    ("dpo__reference_policy_kl_penalty", float("nan"), "a number"),
    ("dpo__reference_policy_kl_penalty", float("inf"), "a number"),
    ("dpo__reference_policy_kl_penalty", 10**400, "a number"),
    ("dpo__loss_type", "kto", "sigmoid"),
    ("dpo__reference__mode", False, "one of resident, cached, none"),
    ("policy__model_name", "  ", "text"),
    ("policy__model_name", 7, "text"),
    ("policy__precision", "float16", "one of bfloat16, float32"),
    ("policy__device", "gpu", "one of auto, cpu, cuda"),
    ("policy__tokenizer__chat_template_kwargs", "x", "mapping"),
    ("policy__megatron_cfg__optimizer__adam_beta1", 1.0, "< 1"),
    ("policy__megatron_cfg__scheduler__lr_decay_style", "inverse-square-root", "one of constant, linear, cosine"),
    ("policy__megatron_cfg__recompute_modules", "core_attn", "a list of"),
    ("policy__megatron_cfg__optimizer", 3, "a section"),
    ("policy__megatron_cfg__optimizer__params_dtype", "bfloat16", "float32"),
    ("data__val_data_paths", ["a.jsonl"], "a mapping"),
    ("data__cache_dir", "", "text or null"),
    ("data__cache_dir", True, "text or null"),
    ("data__num_tokenize_workers", 0, ">= 1 or null"),
    ("data__num_tokenize_workers", 2.5, "whole number"),
    ("checkpointing__keep_top_k", 0, ">= 1"),
    ("logger__log_dir", "", "text"),
]


@pytest.mark.parametrize(("path", "value", "expected"), BAD_VALUES)
def test_bad_value_is_refused_by_its_field(refusals, path, value, expected):
    found = refusals(**{path: value})
    where = path.replace("__", ".")
    assert list(found) == [where], "exactly this field, and no follow-up of it"
    assert found[where].value == value or value != value
    assert expected in found[where].expected
    assert found[where].fix


def test_inside_a_list_and_a_mapping_the_item_is_named(refusals):
    assert list(refusals(policy__megatron_cfg__recompute_modules=["mlp", "moe_act"])) == [
        "policy.megatron_cfg.recompute_modules[1]"
    ]
    found = refusals(data__val_data_paths={"a": "a.jsonl", "b": 3}, checkpointing__metric_name="validation-a_loss")
    assert list(found) == ["data.val_data_paths.b"]


GOOD_VALUES = [
    ("policy__megatron_cfg__optimizer__lr", "5e-6", 5e-6),
    ("policy__megatron_cfg__optimizer__lr", 1, 1.0),
    ("dpo__max_num_steps", None, None),
    ("policy__megatron_cfg__recompute_modules", ["mlp", "core_attn"], ("mlp", "core_attn")),
    ("dpo__sft_loss_weight", 0, 0.0),
]


@pytest.mark.parametrize(("path", "value", "wanted"), GOOD_VALUES)
def test_good_value_is_read(config, path, value, wanted):
    got = config(**{path: value})
    for name in path.split("__"):
        got = getattr(got, name)
    assert got == wanted and type(got) is type(wanted)


UNKNOWN = [
    ("dpo__sedd", "dpo.seed"),
    ("dpo__beta", "dpo.reference_policy_kl_penalty"),
    ("policy__tensor_model_parallel_size", "policy.megatron_cfg.tensor_model_parallel_size"),
    ("policy__megatron_cfg__moe_router_dtyp", "policy.megatron_cfg.moe_router_dtype"),
    ("polcy", "policy"),
    ("data__learning_rate", "policy.megatron_cfg.optimizer.lr"),
]


@pytest.mark.parametrize(("path", "nearest"), UNKNOWN)
def test_unknown_key_is_refused_with_the_nearest_known_one(refusals, path, nearest):
    found = refusals(**{path: 1})
    where = path.replace("__", ".")
    assert list(found) == [where]
    assert f"did you mean {nearest}?" in found[where].fix


def test_what_the_loader_adds_is_not_a_key(refusals):
    assert list(refusals(notes=["x"])) == ["notes"]


def test_all_problems_are_listed_at_once(refusals):
    found = refusals(
        {
            "dpo": {"seed": -1, "bta": 1, "preference_loss_weight": 0},
            "policy": {"precision": "fp16", "megatron_cfg": {"fp8_cfg": {"fp8_param": True}}},
            "checkpointing": {"checkpoint_must_save_by": "soon"},
        }
    )
    assert set(found) == {
        "dpo.seed",
        "dpo.bta",
        "dpo.preference_loss_weight",
        "policy.precision",
        "policy.model_name",
        "policy.megatron_cfg.fp8_cfg.fp8_param",
        "checkpointing.checkpoint_must_save_by",
        "data.train_data_path",
    }


@pytest.mark.parametrize("tree", [{}, {"policy": None}, {"policy": {}, "data": None}])
def test_required_keys_are_named(tree, refusals):
    assert "policy.model_name" in refusals(tree)
    assert "policy.tokenizer" not in refusals(tree), "its name follows the model's"


def test_evaluation_needs_validation_sets_and_no_training_file():
    tree = {"policy": {"model_name": "m"}, "data": {"val_data_paths": {"held-out": "v.jsonl"}}}
    assert build_config(tree, purpose="evaluate").data.train_data_path == ""
    with pytest.raises(ConfigError) as caught:
        build_config({"policy": {"model_name": "m"}}, purpose="evaluate")
    assert [problem.where for problem in caught.value.problems] == ["data.val_data_paths"]


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


@pytest.mark.parametrize(("steps", "epochs", "wanted"), [(None, 3, 30), (7, 1, 7), (99, 2, 20)])
def test_total_steps_is_the_smaller_of_steps_and_epochs(config, steps, epochs, wanted):
    assert config(dpo__max_num_steps=steps, dpo__max_num_epochs=epochs).dpo.total_steps(10) == wanted


def test_the_mapping_given_is_left_alone():
    tree = {"policy": {"model_name": "m", "logprob_batch_size": 1}, "data": {"train": {"data_path": "t"}}}
    assert build_config(tree).data.train_data_path == "t"
    assert tree == {"policy": {"model_name": "m", "logprob_batch_size": 1}, "data": {"train": {"data_path": "t"}}}


def test_a_refusal_exits_with_2():
    assert EXIT_REFUSED == 2


def test_a_problem_is_one_line_and_an_error_carries_all():
    problems = [Problem("a.b", "two\nlines", "x", "y"), Problem("c", "z" * 500, "x", "y")]
    error = DataError(problems)
    assert isinstance(error, UserError) and error.problems == problems
    lines = str(error).splitlines()
    assert lines[0] == "a.b: got 'two\\nlines'; expected x; fix: y"
    assert len(lines) == 2 and len(lines[1]) < 300
    assert ConfigError(problems[0]).problems == problems[:1]
