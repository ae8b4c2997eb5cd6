"""PEFT's folder: what is written is read back, peft's own reader opens it, and what is no adapter of a model is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.config import build_config
from megadpo.config.problems import ConfigError
from megadpo.config.schema_peft import PeftConfig
from megadpo.families import parse_architecture
from megadpo.lora.peft_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_fingerprint,
    folder_problems,
    read_peft,
    tensor_name,
    write_peft,
)
from megadpo.lora.targets import PEFT, find_targets
from tests.helpers.configs import tree_with
from tests.lora.test_targets import LLAMA, QWEN2_MOE, SHAPE

NAMES = ("q_proj", "down_proj")
CONFIG = PeftConfig(enabled=True, dim=4, alpha=6.0, target_modules=NAMES, use_rslora=True)


def write(folder: Path, peft: PeftConfig = CONFIG, arch=LLAMA) -> Path:
    folder.mkdir()
    tensors, modules = {}, []
    for target in find_targets(peft, arch):
        for shared in target.adapters:
            for module in shared:
                name = target.modules[module]
                modules.append(name)
                tensors[tensor_name(name, "A")] = torch.randn(peft.dim, target.in_features)
                tensors[tensor_name(name, "B")] = torch.randn(target.out_features(module), peft.dim)
    write_peft(folder, peft, tensors, modules, base="some/base", arch=arch)
    return folder


def test_what_is_written_is_read_back(tmp_path):
    folder = write(tmp_path / "adapter")
    found = read_peft(folder, "x", LLAMA)
    assert (found.peft.dim, found.peft.alpha, found.peft.use_rslora) == (4, 6.0, True)
    ours, theirs = find_targets(CONFIG, LLAMA), find_targets(found.peft, LLAMA)
    assert [(one.modules, one.adapters) for one in ours] == [(one.modules, one.adapters) for one in theirs]
    assert json.loads((folder / CONFIG_FILE).read_text())["target_modules"] == sorted(NAMES)


def test_peft_itself_reads_the_config(tmp_path):
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(write(tmp_path / "adapter")))
    assert (config.r, config.lora_alpha, config.use_rslora, config.bias) == (4, 6, True, "none")
    assert config.target_modules == {*NAMES} and config.base_model_name_or_path == "some/base"


def test_modules_of_some_layers_are_named_in_full(tmp_path):
    some = PeftConfig(
        enabled=True, dim=4, target_modules=("model.layers.2.self_attn.q_proj", "*.layers.11.*.w?", "*.3.*")
    )
    folder = write(tmp_path / "adapter", some)
    names = json.loads((folder / CONFIG_FILE).read_text())["target_modules"]
    assert "model.layers.2.self_attn.q_proj" in names and "q_proj" not in names
    assert {*read_peft(folder, "x", LLAMA).peft.target_modules} == {*names}


def test_experts(tmp_path):
    folder = write(tmp_path / "adapter", PeftConfig(enabled=True, dim=4, target_modules=("all-linear",)), QWEN2_MOE)
    assert tensor_name("model.layers.3.mlp.experts.2.up_proj", "B") in load_file(folder / WEIGHTS_FILE)
    assert len(find_targets(read_peft(folder, "x", QWEN2_MOE).peft, QWEN2_MOE)) == 12 * (2 + 2 * 3 + 2)
    some = write(tmp_path / "some", PeftConfig(enabled=True, dim=4, target_modules=("experts.1.up_proj",)), QWEN2_MOE)
    with pytest.raises(ConfigError, match=r"the same adapters on all experts of a layer, or none; model.layers.0.mlp"):
        read_peft(some, "x", QWEN2_MOE)


def test_the_fingerprint_is_of_both_files(tmp_path):
    one, other = (write(tmp_path / name) for name in ("one", "other"))
    (other / WEIGHTS_FILE).write_bytes((one / WEIGHTS_FILE).read_bytes())
    assert adapter_fingerprint(one) == adapter_fingerprint(other)
    edit(other, lora_alpha=7)
    assert adapter_fingerprint(one) != adapter_fingerprint(other)


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def without(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS_FILE)


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)


BROKEN = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "a folder with PEFT's adapter_config.json"),
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("[1]"), "no JSON object"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "a folder with adapter_model.safetensors"),
    "cut short": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"\x00"), "a folder with adapter_model.safetensors"),
    "another kind": (lambda f: edit(f, peft_type="IA3"), "another kind of adapter"),
    "DoRA": (lambda f: edit(f, use_dora=True), "DoRA is not supported"),
    "biases": (lambda f: edit(f, bias="all"), "biases are frozen"),
    "whole modules": (lambda f: edit(f, modules_to_save=["lm_head"]), "no whole modules"),
    "ranks by name": (lambda f: edit(f, rank_pattern={"q_proj": 2}), "one rank"),
    "another rank": (lambda f: edit(f, r=8), "expected shape (8, 64), by the model and the rank"),
    "no rank": (lambda f: edit(f, r=None), "the rank, 1 or more"),
    "half": (lambda f: without(f, tensor_name("model.layers.0.self_attn.q_proj", "B")), "layers.0.self_attn.q_proj.lora_B"),
    "another layer": (lambda f: renamed(f, "q_proj", "qkv_proj"), "adapters of this model's linear layers, such as"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_refused(name, tmp_path):
    folder = write(tmp_path / "adapter")
    spoil, words = BROKEN[name]
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        read_peft(folder, "policy.megatron_cfg.peft.init_from", LLAMA)
    assert words in str(caught.value)


def test_the_adapter_of_another_base(tmp_path):
    wider = parse_architecture({"architectures": ["LlamaForCausalLM"], **SHAPE, "hidden_size": 64})
    folder = write(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"expected shape \(64, 4\), by the model and the rank"):
        read_peft(folder, "x", wider)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, []),
        ({"dim": 8, "alpha": 32.0, "use_rslora": False}, ["dim", "alpha", "use_rslora"]),
        ({"target_modules": ["all-linear"]}, ["target_modules"]),
        ({"target_modules": ["q_proj"]}, ["target_modules"]),
    ],
)
def test_a_start_must_be_what_the_config_says(changes, fields, tmp_path):
    folder = write(tmp_path / "adapter")
    same = {"enabled": True, "dim": 4, "alpha": 6.0, "use_rslora": True, "target_modules": [*NAMES]}
    cfg = build_config(tree_with(policy__megatron_cfg__peft={**same, **changes, "init_from": str(folder)}))
    problems = folder_problems(cfg, LLAMA)
    assert [problem.where for problem in problems] == [f"{PEFT}.{field}" for field in fields]
    if fields == ["target_modules"]:
        assert "set it to [down_proj, q_proj]" in str(problems[0])


def test_the_references_adapter_may_be_another(tmp_path):
    folder = write(tmp_path / "adapter")
    tree = tree_with(policy__megatron_cfg__peft={"enabled": True}, dpo__reference__adapter=str(folder))
    assert folder_problems(build_config(tree), LLAMA) == []
    tree["dpo"]["reference"]["adapter"] = str(tmp_path / "nowhere")
    assert [problem.where for problem in folder_problems(build_config(tree), LLAMA)] == ["dpo.reference.adapter"]
