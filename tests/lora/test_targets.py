"""Names of peft.target_modules and exclude_modules: the layers they mean, one A or several, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from megadpo.config import build_config, load_config
from megadpo.config.schema_peft import PeftConfig
from megadpo.families import parse_architecture
from megadpo.lora.targets import PEFT, Target, find_targets, lora_problems
from tests.config.nemo_rl.test_translate import DATA, MEGATRON_ON, NEMO
from tests.helpers.configs import tree_with

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
LLAMA = parse_architecture({"architectures": ["LlamaForCausalLM"], **SHAPE})
QWEN2_MOE = parse_architecture(
    {
        "architectures": ["Qwen2MoeForCausalLM"],
        **SHAPE,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
)


def found(arch: Any = LLAMA, **peft: Any) -> list[Target]:
    return find_targets(PeftConfig(enabled=True, **peft), arch)


def adapters(of: list[Target], layer: int = 0) -> list[str]:
    """Of one layer: the modules that share an A, joined."""
    mine = [one for one in of if one.entry.layer == layer]
    return ["+".join(map(one.label, shared)) for one in mine for shared in one.adapters]


FUSED = ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
APART = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("named", "excluded", "expected"),
    [
        ([], [], FUSED),
        (["*"], [], FUSED),
        (["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], [], FUSED),
        (["all-linear"], [], APART),
        (APART, [], APART),
        (["q_proj"], [], ["q_proj"]),
        (["self_attn.q_proj", "linear_fc2"], [], ["q_proj", "down_proj"]),
        (["*.self_attention.*"], [], FUSED[:2]),
        (["*.[kv]_proj"], [], ["k_proj", "v_proj"]),
        ([], ["linear_fc1", "o_proj"], ["q_proj+k_proj+v_proj", "down_proj"]),
        (["linear_qkv"], ["k_proj"], ["q_proj+v_proj"]),
        (["all-linear"], ["mlp.up_proj", "linear_qkv"], ["o_proj", "gate_proj", "down_proj"]),
    ],
)
def test_layers_by_either_kind_of_name(named, excluded, expected):
    names = {"target_modules": tuple(named), "exclude_modules": tuple(excluded)}
    got = found(**names)
    assert adapters(got) == adapters(got, layer=11) == expected
    cfg = build_config(tree_with(policy__megatron_cfg__peft={"enabled": True, **names}))
    assert lora_problems(cfg, LLAMA) == []


def test_wildcards_and_paths_choose_layers():
    got = found(target_modules=("*.layers.1.*.linear_qkv", "model.layers.11.self_attn.q_proj"))
    assert [(one.entry.layer, one.adapters) for one in got] == [(1, ((0, 1, 2),)), (11, ((0,),))]


def test_experts_and_the_shared_one():
    assert len(found(QWEN2_MOE)) == 12 * (2 + 2 * 3 + 2)
    assert {one.entry.expert for one in found(QWEN2_MOE, target_modules=("mlp.experts.linear_fc1",))} == {0, 1, 2}
    shared = found(QWEN2_MOE, target_modules=("shared_expert.gate_proj",))
    assert [one.modules[0] for one in shared[:1]] == ["model.layers.0.mlp.shared_expert.gate_proj"]
    assert adapters(found(QWEN2_MOE, target_modules=("*.experts.*.down_proj",))) == ["down_proj"] * 3


def test_what_a_layer_is():
    qkv, proj = found()[:2]
    assert (qkv.in_features, [qkv.out_features(m) for m in range(3)], qkv.is_row_parallel) == (32, [32, 16, 16], False)
    assert (proj.in_features, proj.out_features(0), proj.is_row_parallel) == (32, 32, True)


@pytest.mark.parametrize(
    ("peft", "field", "words"),
    [
        ({"target_modules": ["q_prj"]}, "target_modules", "did you mean q_proj?"),
        ({"target_modules": ["lm_head"]}, "target_modules", "a linear layer of the decoder: linear_qkv"),
        ({"target_modules": ["router"]}, "target_modules", "all-linear"),
        ({"target_modules": ["linear_qkv", "q_proj"]}, "target_modules", "keep one of linear_qkv and q_proj"),
        ({"target_modules": ["all-linear", "linear_fc1"]}, "target_modules", "keep one of linear_fc1 and all-linear"),
        ({"exclude_modules": ["linear_fc3"]}, "exclude_modules", "did you mean linear_fc"),
        ({"exclude_modules": ["*"]}, "exclude_modules", "a layer that is left"),
        ({"target_modules": ["k_proj"], "dim": 17}, "dim", "at most 16, the smaller side of k_proj"),
        ({"dim": 33}, "dim", "at most 32"),
    ],
)
def test_refused(peft, field, words):
    cfg = build_config(tree_with(policy__megatron_cfg__peft={"enabled": True, **peft}))
    [problem] = lora_problems(cfg, LLAMA)
    assert problem.where == f"{PEFT}.{field}"
    assert words in str(problem)
    off = build_config(tree_with(policy__megatron_cfg__peft={"enabled": False, **peft}))
    assert lora_problems(off, LLAMA) == []


def test_experts_that_are_one_tensor_are_refused():
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
    arch = parse_architecture({"architectures": ["GptOssForCausalLM"], **SHAPE, **sizes, "attention_bias": True})
    [problem] = lora_problems(build_config(tree_with(policy__megatron_cfg__peft={"enabled": True})), arch)
    assert problem.where == f"{PEFT}.target_modules"
    assert problem.fix.endswith("exclude_modules: [experts.linear_fc1, experts.linear_fc2]")
    peft = {"enabled": True, "exclude_modules": ["experts.linear_fc1", "experts.linear_fc2"]}
    assert lora_problems(build_config(tree_with(policy__megatron_cfg__peft=peft)), arch) == []


@pytest.mark.parametrize(
    ("peft", "field"),
    [
        ({"target_modules": ["experts.1.down_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj", "local_experts.0.linear_fc1"]}, "target_modules"),
        ({"exclude_modules": ["experts.0.gate_proj"]}, "exclude_modules"),
        ({"target_modules": ["*.layers.3.*.experts.?.up_proj"], "exclude_modules": ["experts.2.up_proj"]}, "exclude_modules"),
        ({"target_modules": ["*.local_experts.1.linear_fc1", "*.experts.[02].*_proj"]}, "target_modules"),
    ],
)  # fmt: skip
def test_adapters_on_some_experts_of_a_layer_are_refused(peft, field):
    """No checkpoint could hold them; those on the experts of some layers are one tensor for each."""
    cfg = build_config(tree_with(policy__megatron_cfg__peft={"enabled": True, **peft}))
    [problem] = lora_problems(cfg, QWEN2_MOE)
    assert problem.where == f"{PEFT}.{field}" and list(problem.value) == peft[field]
    assert ".mlp.experts." in problem.expected and "than experts.0" in problem.expected
    layers = {"enabled": True, "target_modules": ["*.layers.3.*.experts.?.up_proj", "experts.linear_fc2"]}
    assert lora_problems(build_config(tree_with(policy__megatron_cfg__peft=layers)), QWEN2_MOE) == []


def test_every_problem_at_once():
    peft = {"enabled": True, "target_modules": ["nothing_at_all", "q_proj", "v_prj"], "dim": 999}
    cfg = build_config(tree_with(policy__megatron_cfg__peft=peft))
    assert len(lora_problems(cfg, LLAMA)) == 3


def test_nemo_rls_file_with_the_overrides_of_its_own_lora_test():
    qwen3_06b = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }
    theirs = [f"{PEFT}.enabled=true", f"{PEFT}.dim=32", "logger.monitor_gpus=true"]
    cfg = load_config(NEMO, [*MEGATRON_ON, *DATA, *theirs])
    peft, arch = cfg.policy.megatron_cfg.peft, parse_architecture(qwen3_06b)
    assert (peft.dim, peft.alpha, peft.target_modules, peft.dropout_position) == (32, 32.0, (), "post")
    assert cfg.dpo.reference.mode == "adapter_off"
    assert lora_problems(cfg, arch) == []
    assert len(find_targets(peft, arch)) == 28 * 4
