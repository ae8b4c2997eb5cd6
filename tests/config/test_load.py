"""A config loads, is saved and reads back as the same one; and none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megadpo.config import (
    ConfigError,
    as_dict,
    build_config,
    load_config,
    save_resolved,
)

REPO = Path(__file__).resolve().parents[2]


SMALL = "policy: {model_name: m}\ndata: {train_data_path: t.jsonl}\n"


def test_smallest_config_has_nemo_rls_defaults(config):
    cfg = config()
    assert (cfg.dpo.val_period, cfg.dpo.val_batches, cfg.dpo.reference_policy_kl_penalty) == (25, 8, 0.05)
    assert (cfg.policy.train_global_batch_size, cfg.policy.precision) == (128, "bfloat16")
    assert cfg.policy.megatron_cfg.optimizer.lr == 5e-6
    assert cfg.policy.sequence_packing.train_mb_tokens == 2 * cfg.policy.max_total_sequence_length
    assert cfg.policy.make_sequence_length_divisible_by == 1
    assert cfg.notes == ()


def test_evaluation_needs_validation_sets_and_no_training_file():
    tree = {"policy": {"model_name": "m"}, "data": {"val_data_paths": {"held-out": "v.jsonl"}}}
    assert build_config(tree, purpose="evaluate").data.train_data_path == ""
    with pytest.raises(ConfigError) as caught:
        build_config({"policy": {"model_name": "m"}}, purpose="evaluate")
    assert [problem.where for problem in caught.value.problems] == ["data.val_data_paths"]


def test_the_mapping_given_is_left_alone():
    tree = {"policy": {"model_name": "m", "logprob_batch_size": 1}, "data": {"train": {"data_path": "t"}}}
    assert build_config(tree).data.train_data_path == "t"
    assert tree == {"policy": {"model_name": "m", "logprob_batch_size": 1}, "data": {"train": {"data_path": "t"}}}


@pytest.mark.parametrize(("steps", "epochs", "wanted"), [(None, 3, 30), (7, 1, 7), (99, 2, 20)])
def test_total_steps_is_the_smaller_of_steps_and_epochs(config, steps, epochs, wanted):
    assert config(dpo__max_num_steps=steps, dpo__max_num_epochs=epochs).dpo.total_steps(10) == wanted


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_round_trips(path, tmp_path):
    cfg = load_config(path)
    assert cfg.notes == (), "our own configs set nothing that has no effect"
    save_resolved(cfg, tmp_path / "sub" / "resolved.yaml")
    assert load_config(tmp_path / "sub" / "resolved.yaml") == cfg
    assert [one.name for one in (tmp_path / "sub").iterdir()] == ["resolved.yaml"]


def test_odd_values_round_trip(write, tmp_path):
    path = write("c.yaml", SMALL)
    cfg = load_config(
        path,
        [
            "policy.megatron_cfg.optimizer.lr=1e-7",
            r"policy.tokenizer.chat_template='{% for m in messages %}\${x} {{ m }}ü: #{% endfor %}'",
            "policy.tokenizer.chat_template_kwargs={enable_thinking: false, deep: {n: [1, 2.5]}}",
            "data.val_data_paths={a-1: x.jsonl, b: y.jsonl}",
            "checkpointing.checkpoint_must_save_by='00:03:45:00'",
            "dpo.max_num_steps=null",
        ],
    )
    assert "${x}" in cfg.policy.tokenizer.chat_template
    save_resolved(cfg, tmp_path / "r.yaml")
    assert load_config(tmp_path / "r.yaml") == cfg
    assert as_dict(cfg) == as_dict(load_config(tmp_path / "r.yaml"))


def test_as_dict_is_plain_yaml_without_notes(config):
    plain = as_dict(config(policy__megatron_cfg__moe_router_dtype="fp64"))
    assert "notes" not in plain and "environment" not in plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


def test_no_torch_and_quick():
    code = (
        "import sys, megadpo.config as c; c.load_config('configs/dpo_megatron.yaml');"
        "print([m for m in ('torch', 'numpy', 'transformers', 'megatron') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - start < 5  # about 0.3 s on a quiet machine
