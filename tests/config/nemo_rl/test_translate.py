"""A NeMo RL DPO file runs unchanged, or is refused key by key; nothing of it is ignored in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megadpo.commands import main
from megadpo.config import Config, ConfigError, build_config, check_layout, load_config
from megadpo.config.nemo_rl.translate import nemo_keys
from megadpo.config.no_effect import without_experts
from megadpo.config.reader import dotted_paths
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA, QWEN3_MOE
from tests.helpers.runs import make_model, make_pairs

SCHEMA_PATHS = frozenset(dotted_paths(Config))
REFUSED = [key for key in nemo_keys().values() if key.accepted is not None]
NO_EFFECT = {key.path: key.why for key in nemo_keys().values() if key.accepted is None and not key.in_schema}
FEWER_VALUES = [key for key in nemo_keys().values() if key.in_schema]
NEMO = Path(__file__).with_name("nemo_rl_dpo.yaml")
MEG = "policy.megatron_cfg"
MEGATRON_ON = ["policy.dtensor_cfg.enabled=false", f"{MEG}.enabled=true"]
MEGATRON_QUICK = ["policy.optimizer=null", "checkpointing.enabled=false", "dpo.sft_loss_weight=0.01",
                  "policy.train_micro_batch_size=1", "policy.train_global_batch_size=256",
                  f"policy.make_sequence_length_divisible_by=${{{MEG}.tensor_model_parallel_size}}",
                  "cluster.gpus_per_node=8", "cluster.num_nodes=4"]  # fmt: skip
DATA = [
    "data.train={dataset_name: BinaryPreferenceDataset, data_path: t.jsonl, split: train}",
    "data.validation={dataset_name: BinaryPreferenceDataset, data_path: v.jsonl, prompt_key: question}",
    "data.default={prompt_key: question, chosen_key: good, rejected_key: bad, system_prompt_file: null}",
]
# What its recipes change of that file, as far as it is read differently.
RECIPES = {
    "tp1pp2": [*MEGATRON_QUICK, f"{MEG}.pipeline_model_parallel_size=2", f"{MEG}.tensor_model_parallel_size=1",
               f"{MEG}.sequence_parallel=false"],
    "tp2pp2": [*MEGATRON_QUICK, f"{MEG}.pipeline_model_parallel_size=2"],
    "tp2pp2vpp16": [*MEGATRON_QUICK, f"{MEG}.pipeline_model_parallel_size=2",
                    f"{MEG}.virtual_pipeline_model_parallel_size=16"],
    "tp4": [*MEGATRON_QUICK, f"{MEG}.tensor_model_parallel_size=4", "policy.max_total_sequence_length=8192"],
    "fused logprobs": [f"{MEG}.use_fused_linear_logprobs=true", f"{MEG}.fused_linear_logprobs_chunk_size=128",
                       f"{MEG}.distributed_data_parallel_config.overlap_param_gather=false",
                       f"{MEG}.attention_backend=unfused", f"{MEG}.freeze_moe_router=true",
                       f"{MEG}.moe_router_bias_update_rate=0.0", f"{MEG}.scheduler.lr_decay_iters=32",
                       f"{MEG}.scheduler.lr_warmup_iters=10", "policy.make_sequence_length_divisible_by=8"],
    "fsdp": [],
    "tulu3": ["dpo.val_period=-1", "checkpointing.metric_name=null", "data.train={dataset_name: Tulu3Preference}",
              "data.validation=null", "dpo.val_global_batch_size=${policy.train_global_batch_size}"],
    "tp8 long": ["policy.dtensor_cfg.tensor_parallel_size=8", "policy.max_total_sequence_length=8192",
                 "policy.dtensor_cfg.clear_cache_every_n_steps=1", "policy.train_global_batch_size=8"],
    "experts": ["policy.hf_config_overrides={router_aux_loss_coef: 0.0}", "policy.offload_optimizer_for_logprob=true",
                "policy.dtensor_cfg.automodel_kwargs={backend: {attn: te}}", "policy.dtensor_cfg.expert_parallel_size=8"],
}  # fmt: skip
LLAMA_8B = {**LLAMA, "hidden_size": 64, "num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 4,
            "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 131072, "rope_scaling": None}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_megatron_on_runs_as_it_is(recipe):
    cfg = load_config(NEMO, [*MEGATRON_ON, *RECIPES[recipe]])
    assert cfg.data.train_data_path.startswith(("nvidia/HelpSteer3", "allenai/"))
    llama = parse_architecture(LLAMA_8B)
    cfg = without_experts(cfg, llama)
    assert check_layout(cfg, llama, None) == []
    assert sum(note.startswith("NeMo RL's keys") for note in cfg.notes) == 1
    assert sum("has no experts" in note for note in cfg.notes) == 1


def test_nemo_rls_own_file_with_its_other_back_end_is_refused_by_that():
    with pytest.raises(ConfigError) as caught:
        load_config(NEMO)
    assert {one.where for one in caught.value.problems} == {f"{MEG}.enabled", "policy.dtensor_cfg.enabled"}


def test_a_whole_check_of_its_file(tmp_path, capsys):
    model = make_model(tmp_path / "model", max_position_embeddings=1024)
    for name in ("t", "v"):
        make_pairs(tmp_path / f"{name}.jsonl", 140)
    paths = [f"policy.model_name={model}", f"policy.tokenizer.name={model}", f"data.train_data_path={tmp_path}/t.jsonl",
             f"data.val_data_paths={tmp_path}/v.jsonl"]  # fmt: skip
    assert main(["check", str(NEMO), *MEGATRON_ON, *paths]) == 0
    printed = capsys.readouterr().out
    assert "1 steps; no problem found" in printed
    assert "data.train: {'dataset_name': 'HelpSteer3', 'split': 'train'} of the file gives way to" in printed


def test_it_loads_and_every_idle_key_is_noted():
    cfg = load_config(NEMO, [*MEGATRON_ON, *DATA])
    assert cfg.data.train_data_path == "t.jsonl"
    assert cfg.data.val_data_paths == {"default": "v.jsonl"}
    keys = {"prompt_key": "question", "chosen_key": "good", "rejected_key": "bad"}
    assert keys.items() <= cfg.data.format_options.items()
    assert cfg.policy.logprob_chunk_size == 256
    assert cfg.policy.megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32 is False
    assert cfg.dpo.max_num_steps == 150
    notes = "\n".join(cfg.notes)
    for idle in ("moe_router_bias_update_rate", "dtensor_cfg.{", "policy.scheduler", "policy.optimizer", "split"):
        assert idle in notes


def leaves(tree, prefix=""):
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, path + ".")
        else:
            yield path


def test_no_key_of_the_file_is_ignored_in_silence():
    notes = "\n".join(load_config(NEMO, [*MEGATRON_ON, *DATA]).notes)
    known = {*SCHEMA_PATHS, *nemo_keys(), f"{MEG}.fused_linear_logprobs_chunk_size", f"{MEG}.checkpoint.async_save"}
    for path in leaves(yaml.safe_load(NEMO.read_text())):
        sections = [path[:dot] for dot, letter in enumerate(path) if letter == "."]
        dataset = path.startswith(("data.train.", "data.validation."))
        section = any(f"{one}.*" in known or f"{one} (" in notes for one in sections)
        assert path in known or path in notes or section or dataset, path


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.path)
def test_a_refused_key_is_refused_and_its_off_values_are_not(entry, refusals, config):
    at = entry.path.replace(".", "__")
    on = next(value for value in (True, 2, "something", {"a": 1}) if value not in entry.accepted)
    if entry.experts:
        found = {one.where: one for one in check_layout(config(**{at: on}), parse_architecture(QWEN3_MOE), None)}
        assert check_layout(config(**{at: on}), parse_architecture(LLAMA_8B), None) == []
    else:
        found = refusals(**{at: on})
    assert list(found) == [entry.path]
    assert entry.why in found[entry.path].expected and found[entry.path].fix == entry.fix
    for off in entry.accepted:
        assert config(**{at: off}).notes == ()
        assert config(**{at: off}) == config()


@pytest.mark.parametrize("path", [one for one in NO_EFFECT if not one.endswith(".*")])
def test_a_key_without_effect_is_accepted_with_a_note(path, config):
    cfg = config(**{path.replace(".", "__"): "anything"})
    assert cfg == config()
    assert cfg.notes == (f"NeMo RL's keys without effect here: {path} ({NO_EFFECT[path]})",)
    assert config(**{path.replace(".", "__"): False}).notes == ()


@pytest.mark.parametrize("path", [one[:-2] for one in NO_EFFECT if one.endswith(".*")])
def test_a_section_without_effect(path, config, refusals):
    at = path.replace(".", "__")
    (note,) = config(**{at: {"one": 1, "two": {"three": 3}, "four": None}}).notes
    assert f"{path}.{{one, two}} (" in note
    assert config(**{at: None}) == config(**{at: {}}) == config()
    assert config(**{at: {}}).notes == ()
    assert list(refusals(**{at: "on"})) == [path]


def test_one_note_for_all_and_each_reason_once(config):
    (note,) = config(policy__refit_buffer_size_gb=1, policy__generation={"a": 1}, cluster__segment_size=4).notes
    assert "policy.refit_buffer_size_gb, policy.generation (DPO generates nothing); cluster.segment_size (" in note


@pytest.mark.parametrize("kind", ["sinkhorn", "global_aux_loss"])
def test_what_only_a_model_with_experts_refuses(kind, config):
    cfg = config(policy__megatron_cfg__moe_router_load_balancing_type=kind)
    (problem,) = check_layout(cfg, parse_architecture(QWEN3_MOE), None)
    assert problem.where == f"{MEG}.moe_router_load_balancing_type" and problem.value == kind
    dense = without_experts(cfg, parse_architecture(LLAMA_8B))
    assert check_layout(dense, parse_architecture(LLAMA_8B), None) == []
    assert kind in dense.notes[0] and dense == config()


@pytest.mark.parametrize("key", ["policy__megatron_cfg__checkpoint__async_save", "checkpointing__is_async"])
def test_saving_beside_the_steps_has_one_key(config, key):
    cfg = config(**{key: True})
    assert cfg.checkpointing.async_save and "read as checkpointing.async_save: True" in cfg.notes[0]
    assert config(**{key: False}) == config()
    assert not config(**{key: True}, checkpointing__async_save=False).checkpointing.async_save


def test_values_that_mean_the_same_numbers(config):
    flex = config(policy__megatron_cfg__moe_token_dispatcher_type="flex")
    assert flex.policy.megatron_cfg.moe_token_dispatcher_type == "alltoall" and "flex" in flex.notes[0]
    override = config(policy__hf_config_overrides={"router_aux_loss_coef": 0.5},
                      policy__megatron_cfg__moe_router_load_balancing_type="aux_loss")  # fmt: skip
    assert override.policy.megatron_cfg.moe_aux_loss_coeff == 0.5 and "router_aux_loss_coef" in override.notes[0]
    assert config(policy__megatron_cfg__fp8_cfg={"enabled": False, "fp8_recipe": "mxfp8"}) == config()
    assert config(policy__megatron_cfg__peft={"lora_dtype": "None", "dropout_position": "post"}) == config()
    aware = {"policy__megatron_cfg__optimizer__use_precision_aware_optimizer": True}
    assert config(**aware) == config() and "not proved to resume" in config(**aware).notes[0]
    assert config(**aware, checkpointing__save_optimizer=False).notes == ()
    sliced = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    padded = config(policy__megatron_cfg=sliced, policy__make_sequence_length_divisible_by=1)
    assert padded.policy.make_sequence_length_divisible_by == 2


@pytest.mark.parametrize("key", FEWER_VALUES, ids=lambda key: key.path)
def test_a_value_that_the_schema_has_not_is_refused_with_the_reason(key, refusals, config):
    at = key.path.replace(".", "__")
    on = key.path.rpartition(".")[0].replace(".", "__") + "__enabled"
    found = refusals(**{at: "something", **({on: True} if "fp8" in key.path else {})})
    assert key.why in found[key.path].expected
    assert config(**{at: None}) == config()


def test_the_table_names_keys_of_the_schema_only_for_fewer_values():
    assert {key.path for key in nemo_keys().values() if key.path in SCHEMA_PATHS} == {one.path for one in FEWER_VALUES}


def test_false_is_not_zero_for_a_refused_key(refusals):
    assert list(refusals(policy__megatron_cfg__mtp_num_layers=False)) == [f"{MEG}.mtp_num_layers"]


@pytest.mark.parametrize("name", ["fused_linear_logprobs_chunk_size", "linear_ce_fusion_chunk_size"])
def test_other_names_of_the_head_chunk(name, config, refusals):
    at = f"policy__megatron_cfg__{name}"
    assert config(**{at: 128}).policy.logprob_chunk_size == 128
    assert config(**{at: None}).policy.logprob_chunk_size == 1024
    assert config(**{at: None, "policy__logprob_chunk_size": 64}).policy.logprob_chunk_size == 64
    assert config(**{at: 128, "policy__logprob_chunk_size": 128}).policy.logprob_chunk_size == 128
    assert list(refusals(**{at: 128, "policy__logprob_chunk_size": 64})) == [f"{MEG}.{name}"]


DATA_REFUSED = [
    ({"train": {"data_path": "a"}, "train_data_path": "b"}, "data.train.data_path"),
    ({"train": {"dataset_name": "OpenMathInstruct-2", "data_path": "a"}}, "data.train.dataset_name"),
    ({"train": {"dataset_name": "PreferenceDataset"}}, "data.train.data_path"),
    (
        {
            "train": {"dataset_name": "HelpSteer3"},
            "validation": {"dataset_name": "BinaryPreferenceDataset", "data_path": "v.jsonl"},
        },
        "data.validation.dataset_name",
    ),
    ({"train": {}}, "data.train.data_path"),
    ({"train": {"data_path": "org/name", "split": 3}}, "data.train.split"),
    ({"train": {"data_path": "a.jsonl", "subset": "preference"}}, "data.train.subset"),
    ({"train": {"data_path": "a", "split_validation_size": 0.1}}, "data.train.split_validation_size"),
    ({"train": ["a"]}, "data.train"),
    ({"train": [{"data_path": "a"}, {"data_path": 3}]}, "data.train[1].data_path"),
    (
        {"train": [{"data_path": "a", "prompt_key": "p"}, {"data_path": "b", "prompt_key": "q"}]},
        "data.train[1].prompt_key",
    ),
    ({"train": {"data_path": "a.jsonl.gz", "split": "test"}}, "data.train.split"),
    ({"train": {"data_path": "a", "prompt_file": "p.txt"}}, "data.train.prompt_file"),
    ({"train": {"data_path": "a", "promt_key": "p"}}, "data.train.promt_key"),
    (
        {"train": {"data_path": "a", "prompt_key": "p"}, "validation": {"data_path": "b", "prompt_key": "q"}},
        "data.validation.prompt_key",
    ),
    ({"train_data_path": "a", "val_data_path": "b", "val_data_paths": {"c": "d"}}, "data.val_data_path"),
    ({"train_data_path": "a", "dataset_name": "HelpSteer"}, "data.dataset_name"),
    ({"train_data_path": "a", "dataset_name": "DPODataset", "chosen_key": "good"}, "data.chosen_key"),
    ({"train_data_path": "a", "dataset_name": "Tulu3Preference", "prompt_key": "question"}, "data.prompt_key"),
]


@pytest.mark.parametrize(("data", "where"), DATA_REFUSED)
def test_a_data_section_that_cannot_be_translated(data, where, refusals):
    assert list(refusals({"policy": {"model_name": "m"}, "data": data})) == [where]


@pytest.mark.parametrize(
    "data",
    [
        {"train": {"data_path": "a"}, "validation": {"data_path": "v"}},
        {"train_data_path": "a", "val_data_paths": "v"},
        {"train_data_path": "a", "val_data_path": "v"},
        {"train_data_path": "a", "val_data_paths": {"default": "v"}, "train": None, "default": None},
        {"train": {"data_path": "a", "subset": None, "split": None}, "validation": {"data_path": "v"}},
        {"train": [{"data_path": "a"}], "validation": [{"data_path": "v"}], "default": {"split": None}},
    ],
)
def test_every_spelling_of_the_same_data(data, config):
    want = config(data__train_data_path="a", data__val_data_paths={"default": "v"})
    assert config(data=data) == want


def test_lists_of_datasets_are_joined(config):
    data = {
        "default": {"dataset_name": "BinaryPreferenceDataset", "prompt_key": "q"},
        "train": [{"data_path": "a.jsonl"}, {"data_path": "org/name", "subset": "s"}],
        "validation": [{"data_path": "v.jsonl"}, {"data_path": "w", "split": "test"}],
    }
    found = config(data=data).data
    assert (found.train_data_path, found.train_shares) == (("a.jsonl", "org/name:s"), None)
    assert found.val_data_paths == {"default": ("v.jsonl", "w@test")}
    assert found.dataset_name == "BinaryPreferenceDataset" and found.format_options["prompt_key"] == "q"


HELPSTEER = "nvidia/HelpSteer3:preference"


@pytest.mark.parametrize(
    ("data", "train", "val", "name"),
    [
        (
            {
                "train": {"dataset_name": "HelpSteer3", "split": "train"},
                "validation": {"dataset_name": "HelpSteer3", "split": "validation"},
            },
            f"{HELPSTEER}@train",
            {"default": f"{HELPSTEER}@validation"},
            "HelpSteer3",
        ),
        ({"dataset_name": "HelpSteer3"}, f"{HELPSTEER}@train", {"default": f"{HELPSTEER}@validation"}, "HelpSteer3"),
        ({"dataset_name": "HelpSteer3", "val_data_paths": None}, f"{HELPSTEER}@train", None, "HelpSteer3"),
        ({"dataset_name": "HelpSteer3", "train_data_path": "h.jsonl"}, "h.jsonl", None, "HelpSteer3"),
        (
            {"train": {"dataset_name": "Tulu3Preference", "split": "train[:1%]"}},
            "allenai/llama-3.1-tulu-3-8b-preference-mixture@train[:1%]",
            None,
            "Tulu3Preference",
        ),
        (
            {
                "default": {"dataset_name": "PreferenceDataset"},
                "train": {"data_path": "t.jsonl"},
                "validation": {"data_path": "org/name", "split": "test"},
            },
            "t.jsonl",
            {"default": "org/name@test"},
            "PreferenceDataset",
        ),
        ({"train": {"data_path": "org/name", "subset": "v2", "split": "dpo"}}, "org/name:v2@dpo", None, None),
    ],
)
def test_datasets_by_name(data, train, val, name):
    cfg = build_config({"policy": {"model_name": "m"}, "data": data})
    assert (cfg.data.train_data_path, cfg.data.val_data_paths, cfg.data.dataset_name) == (train, val, name)


def test_names_of_the_answers_are_read_in_the_formats_that_have_them(config):
    for name in ("BinaryPreferenceDataset", "Tulu3Preference", "ImplicitPrompt", None):
        assert config(data__dataset_name=name, data__chosen_key="good").data.format_options["chosen_key"] == "good"


def test_the_guides_yaml_with_two_validation_sets():
    """The DPO guide's block for a custom preference dataset, its placeholders filled in."""
    text = """\
data:
  dataset_name: PreferenceDataset
  train_data_path: <LocalPathToTrainingDataset>
  val_data_paths:
    <NameOfValidationDataset1>: <LocalPathToValidationDataset1>
    <NameOfValidationDataset2>: <LocalPathToValidationDataset2>
"""
    text = re.sub("<LocalPathTo(.*?)Dataset(.?)>", r"\1\2.jsonl", re.sub("<NameOf(.*?)>", r"\1", text))
    cfg = build_config({"policy": {"model_name": "m"}, **yaml.safe_load(text)})
    assert cfg.data.dataset_name == "PreferenceDataset" and cfg.data.train_data_path == "Training.jsonl"
    assert cfg.data.val_data_paths == {
        "ValidationDataset1": "Validation1.jsonl",
        "ValidationDataset2": "Validation2.jsonl",
    }
