"""Types, ranges and unknown keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megadpo.config import (
    ConfigError,
    load_config,
)
from megadpo.config import reader as reader_module
from megadpo.config.nemo_rl.translate import nemo_paths
from megadpo.config.reader import dotted_paths, keys_of, names_elsewhere, nearest_name
from megadpo.config.schema import Config

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
    ("dpo__reference__mode", False, "one of resident, cached, adapter_off, none"),
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
    ("data__val_data_paths", 3, "a mapping"),
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
    ("dpo__loss", "dpo.loss_type"),
    ("policy__gradient_checkpointing", "policy.megatron_cfg.activation_checkpointing"),
    ("per_device_train_batch_size", "policy.train_micro_batch_size"),
    ("policy__gradient_accumulation_steps", "policy.train_global_batch_size"),
    ("logger__report_to", "logger.wandb_enabled"),
    ("policy__lora", "policy.megatron_cfg.peft.enabled"),
]


@pytest.mark.parametrize(("path", "nearest"), UNKNOWN)
def test_unknown_key_is_refused_with_the_nearest_known_one(refusals, path, nearest):
    found = refusals(**{path: 1})
    where = path.replace("__", ".")
    assert list(found) == [where]
    assert f"did you mean {nearest}?" in found[where].fix


def test_text_that_no_path_can_be(refusals):
    found = refusals(
        policy__model_name="a\0b",
        data__train_data_path="d/" + "x" * 5000,
        checkpointing__checkpoint_dir="x" * 300,
        logger__log_dir="a/" * 2500,
        data__val_data_paths={"a": "\ud800"},
        policy__tokenizer__chat_template="{{ x }}" + "y" * 9000 + "\0",
    )
    assert "NUL" in found["policy.model_name"].expected and "NUL" in found["policy.tokenizer.chat_template"].expected
    assert "half character" in found["data.val_data_paths.a"].expected
    for key in ("data.train_data_path", "checkpointing.checkpoint_dir", "logger.log_dir"):
        assert "at most 3000 bytes" in found[key].expected
    assert all(len(str(problem)) < 600 for problem in found.values())


def test_every_name_of_another_trainer_leads_to_a_key():
    names, paths = names_elsewhere(), frozenset(dotted_paths(Config)) | nemo_paths()
    assert len(names) >= 200
    assert {name: key for name, key in names.items() if key not in paths} == {}
    listed = [name for line in table_of_names().values() for name in line]
    assert sorted(listed) == sorted(names), "a name stands once"
    assert [name for name in names if nearest_name(name, [], paths) != names[name]] == []
    assert names.keys().isdisjoint(keys_of(Config)), "a section of ours"


def table_of_names():
    return yaml.safe_load((Path(reader_module.__file__).with_name("other_trainers.yaml")).read_text())


def test_a_section_of_another_trainer_is_one_problem(refusals):
    found = refusals(policy={"model_name": "m", "attn_type": {"kind": "x", "window": 3}}, data={"train_data_path": "t"})
    assert list(found) == ["policy.attn_type"]
    assert "did you mean policy.attention_kernel?" in found["policy.attn_type"].fix


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


SMALL = "policy: {model_name: m}\ndata: {train_data_path: t.jsonl}\n"


def problems_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


TRAINING = ["training.name", "training.num_epochs"]


def test_somebody_elses_section_is_refused_key_by_key(write):
    text = "loss_fn: {reference_policy_kl_penalty: 0.1, deep: {lr: 1}}\ntraining: {num_epochs: 3, name: x}\n"
    problems = {one.where: one.fix for one in problems_of(write("c.yaml", SMALL + text))}
    assert sorted(problems) == ["loss_fn.deep.lr", "loss_fn.reference_policy_kl_penalty", *TRAINING]
    assert problems["training.name"] == "remove it", "several sections have a name"
    assert "did you mean dpo.reference_policy_kl_penalty?" in problems["loss_fn.reference_policy_kl_penalty"]
    assert "policy.megatron_cfg.optimizer.lr" in problems["loss_fn.deep.lr"]
    assert "dpo.max_num_epochs" in problems["training.num_epochs"]
