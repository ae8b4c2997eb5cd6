"""Patterns of policy.freeze: what they match, what is refused, and what has gradients afterwards."""

from __future__ import annotations

import dataclasses

import pytest

from megadpo.families import parse_architecture, weight_table
from megadpo.model.freeze import expand, freeze_problems
from tests.helpers.distributed import run_distributed
from tests.model.weights.hf_models import make_hf_folder

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
QWEN3_MOE = parse_architecture(
    {"architectures": ["Qwen3MoeForCausalLM"], **SHAPE, "num_experts": 4, "num_experts_per_tok": 2}
)
QWEN2 = parse_architecture({"architectures": ["Qwen2ForCausalLM"], **SHAPE})


def test_ranges_are_those_of_bash():
    assert expand("model.layers.{9..11}.*") == ["model.layers.9.*", "model.layers.10.*", "model.layers.11.*"]
    assert expand("{0..1}{2..3}") == ["02", "03", "12", "13"]
    assert expand("model.norm.weight") == ["model.norm.weight"]
    assert expand("a{3..2}") == []


@pytest.mark.parametrize(
    "patterns",
    [
        [],
        ["model.embed_tokens.weight"],
        ["model.layers.{0..10}.*", "lm_head.*"],
        ["*.mlp.*"],
        ["*_proj.weight"],
        ["model.layers.?.*"],
        ["*.q_proj.weight", "*.[kv]_proj.weight"],
    ],
)
def test_possible(patterns):
    assert freeze_problems(patterns, LLAMA) == []


def test_all_experts_of_a_layer_can_be_frozen():
    assert freeze_problems(["model.layers.{0..3}.mlp.experts.*", "*.experts.*.down_proj.weight"], QWEN3_MOE) == []


@pytest.mark.parametrize(
    ("patterns", "arch", "words"),
    [
        (["model.layers.12.*"], LLAMA, "matches a weight's Hugging Face name"),
        (["embedding"], LLAMA, "matches a weight's Hugging Face name"),
        (["embedding"], dataclasses.replace(LLAMA, tie_word_embeddings=True), "matches a weight's Hugging Face name"),
        (["model.layers.{0..9999999999}.*"], LLAMA, "at most 10000 patterns"),
        (["model.layers.{0..999}{0..999}.*"], LLAMA, "at most 10000 patterns"),
        ([f"model.layers.{{0..{'9' * 5000}}}.*"], LLAMA, "at most 10000 patterns"),
        (["model.layers.{3..1}.*"], LLAMA, "matches a weight's Hugging Face name"),
        (["lm_head.weight"], dataclasses.replace(LLAMA, tie_word_embeddings=True), "model.embed_tokens.weight, which"),
        (
            ["*.q_proj.weight"],
            LLAMA,
            "model.layers.0.self_attn.k_proj.weight and model.layers.0.self_attn.v_proj.weight",
        ),
        (["model.layers.3.mlp.up_proj.weight"], LLAMA, "they are one parameter here (mlp.linear_fc1.weight)"),
        (["*.self_attn.*.weight"], QWEN2, "gives a bias no gradient alone"),
        (["*.experts.{0..1}.*"], QWEN3_MOE, "model.layers.0.mlp.experts.{e}.gate_proj.weight leaves 2, 3 to train"),
        (["model.*", "lm_head.weight"], LLAMA, "leave a weight to train"),
    ],
)
def test_refused(patterns, arch, words):
    problems = freeze_problems(patterns, arch)
    assert len(problems) == 1 and words in problems[0].expected
    assert problems[0].where == "policy.freeze" and problems[0].fix


def test_a_pattern_without_a_match_is_told_the_layers():
    [problem] = freeze_problems(["model.layers.12.*"], LLAMA)
    assert "model.layers.0 to 11: model.layers.{0..11}.*" in problem.fix


def test_every_problem_at_once():
    assert len(freeze_problems(["nothing", "*.q_proj.weight", "*.up_proj.weight"], LLAMA)) == 3


def trained_names_and_memory(folder, patterns):
    """Of a frozen model in one process: names with gradients, numbers in gradient buffers, numbers in moments."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.freeze import freeze
    from megadpo.model.weights.load import named_global_parameters
    from megadpo.optimizer.build import build_optimizer, wrap_for_training
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(pipeline=2), setup_device("auto"))
    arch = read_architecture(folder)
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision="float32",
        megatron_cfg=MegatronConfig(pipeline_model_parallel_size=2),
    )
    chunks = build_model(arch, policy, parallel, frozen=False)
    freeze(chunks, patterns, arch)
    wrapped = wrap_for_training(chunks, policy)
    optimizer = build_optimizer(wrapped, policy, parallel.device)
    names = {n: p.numel() for n, p in named_global_parameters(chunks[0]) if p.requires_grad}
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    buffers = sum(p.numel() for chunk in wrapped for buffer in chunk.buffers for p in buffer.params)
    return names, held, buffers


@pytest.mark.distributed
def test_frozen_weights_have_no_gradients_and_no_optimizer_state(tmp_path):
    """Tied embeddings on two stages: the last stage's copy is frozen with the first's; a stage may be frozen whole."""
    make_hf_folder(tmp_path, "llama_tied")
    patterns = ["model.embed_tokens.weight", "model.layers.{0..1}.*", "model.layers.2.input_layernorm.weight"]
    (first, *nothing), (last, held, buffers) = run_distributed(
        trained_names_and_memory, 2, str(tmp_path), patterns, init_process_group=False
    )
    assert first == {} and nothing == [0, 0]
    kinds = {entry.names[0] for entry in weight_table(LLAMA).entries if entry.layer in (2, 3)}
    assert set(last) == kinds - {"decoder.layers.2.input_layernorm.weight"} | {"decoder.final_layernorm.weight"}
    assert held == buffers == sum(last.values())
