"""A NeMo RL DPO file runs unchanged, or is refused key by key; nothing of it is ignored in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megadpo.config import Config, ConfigError, build_config, load_config
from megadpo.config.nemo_rl.translate import nemo_keys
from megadpo.config.reader import dotted_paths

SCHEMA_PATHS = frozenset(dotted_paths(Config))
REFUSED = [key for key in nemo_keys().values() if key.accepted is not None]
NO_EFFECT = {key.path: key.why for key in nemo_keys().values() if key.accepted is None and not key.in_schema}
FEWER_VALUES = [key for key in nemo_keys().values() if key.in_schema]
NEMO = Path(__file__).with_name("nemo_rl_dpo.yaml")
MEG = "policy.megatron_cfg"
FIXES = [
    "policy.dtensor_cfg.enabled=false",
    "policy.optimizer=null",
    "policy.make_sequence_length_divisible_by=${policy.megatron_cfg.tensor_model_parallel_size}",
    f"{MEG}.optimizer.use_precision_aware_optimizer=false",
    "logger.monitor_gpus=false",
    "data.train={dataset_name: BinaryPreferenceDataset, data_path: t.jsonl, split: train}",
    "data.validation={dataset_name: BinaryPreferenceDataset, data_path: v.jsonl, prompt_key: question}",
    "data.default={prompt_key: question, chosen_key: good, rejected_key: bad, system_prompt_file: null}",
]


def test_nemo_rls_own_file_is_refused_key_by_key():
    with pytest.raises(ConfigError) as caught:
        load_config(NEMO)
    assert {problem.where for problem in caught.value.problems} == {
        "policy.dtensor_cfg.enabled",
        "policy.optimizer",
        "policy.make_sequence_length_divisible_by",
        f"{MEG}.optimizer.use_precision_aware_optimizer",
        "logger.monitor_gpus",
    }


def test_with_the_fixes_it_loads_and_every_idle_key_is_noted():
    cfg = load_config(NEMO, FIXES)
    assert cfg.data.train_data_path == "t.jsonl"
    assert cfg.data.val_data_paths == {"default": "v.jsonl"}
    assert cfg.data.format_options == {"prompt_key": "question", "chosen_key": "good", "rejected_key": "bad"}
    assert cfg.policy.logprob_chunk_size == 256
    assert cfg.policy.megatron_cfg.distributed_data_parallel_config.grad_reduce_in_fp32 is False
    assert cfg.dpo.max_num_steps == 150
    notes = "\n".join(cfg.notes)
    for idle in (
        "moe_router_bias_update_rate",
        "dtensor_cfg.{",
        "policy.scheduler",
        "gpu_monitoring.{",
        "split",
    ):
        assert idle in notes


def leaves(tree, prefix=""):
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from leaves(value, path + ".")
        else:
            yield path


def test_no_key_of_the_file_is_ignored_in_silence():
    cfg = load_config(NEMO, FIXES)
    accepted_at_off = {entry.path for entry in REFUSED}
    moved = {f"{MEG}.fused_linear_logprobs_chunk_size"}
    for path in leaves(yaml.safe_load(NEMO.read_text())):
        section = path.rpartition(".")[0]
        noted = any(
            note.startswith((f"{path}:", f"{section}.{{")) or f"{section.rpartition('.')[0]}.{{" in note
            for note in cfg.notes
        )
        dataset = path.startswith(("data.train.", "data.validation."))
        refused = path in accepted_at_off or path.startswith("policy.optimizer.")
        assert path in SCHEMA_PATHS or noted or refused or dataset or path in moved, path


@pytest.mark.parametrize("entry", REFUSED, ids=lambda entry: entry.path)
def test_a_refused_key_is_refused_and_its_off_values_are_not(entry, refusals, config):
    at = entry.path.replace(".", "__")
    on = next(value for value in (True, 2, "something", {"a": 1}) if value not in entry.accepted)
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
    (note,) = cfg.notes
    assert note.startswith(path) and NO_EFFECT[path] in note


@pytest.mark.parametrize("path", [one[:-2] for one in NO_EFFECT if one.endswith(".*")])
def test_a_section_without_effect(path, config, refusals):
    at = path.replace(".", "__")
    (note,) = config(**{at: {"one": 1, "two": {"three": 3}}}).notes
    assert note.startswith(f"{path}.{{one, two}}")
    assert config(**{at: None}) == config(**{at: {}}) == config()
    assert config(**{at: {}}).notes == ()
    assert list(refusals(**{at: "on"})) == [path]


@pytest.mark.parametrize("key", FEWER_VALUES, ids=lambda key: key.path)
def test_a_value_that_the_schema_has_not_is_refused_with_the_reason(key, refusals, config):
    at = key.path.replace(".", "__")
    found = refusals(**{at: "something"})
    assert list(found) == [key.path] and key.why in found[key.path].expected
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
    ({"train": [{"data_path": "a"}]}, "data.train"),
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
    ],
)
def test_every_spelling_of_the_same_data(data, config):
    want = config(data__train_data_path="a", data__val_data_paths={"default": "v"})
    assert config(data=data) == want


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
