"""Whose layers, whose AdamW, float8: what fits together, and what a model's shape allows."""

from __future__ import annotations

import pytest

from megadpo.config import load_config, save_resolved
from megadpo.config.check import check_layout
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA, QWEN3_MOE

MEG = "policy.megatron_cfg"
IMPL, FP8, PAD = f"{MEG}.transformer_impl", f"{MEG}.fp8_cfg.enabled", "policy.make_sequence_length_divisible_by"
ADAM = f"{MEG}.optimizer.adam_impl"
LAYERNORM = {"activation_checkpointing": True, "recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
TE = {"transformer_impl": "transformer_engine"}
ON = {"fp8_cfg": {"enabled": True}}
SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 4, "sequence_parallel": True}


def test_defaults(config):
    megatron = config().policy.megatron_cfg
    assert (megatron.transformer_impl, megatron.fp8_cfg.enabled, megatron.optimizer.kind.adam_impl) == (
        "auto",
        False,
        "auto",
    )
    assert config(policy__megatron_cfg={"transformer_impl": None, "fp8_cfg": None}) == config()


@pytest.mark.parametrize(
    ("policy", "where"),
    [
        ({"megatron_cfg": {"transformer_impl": "te"}}, IMPL),
        ({"megatron_cfg": TE, "precision": "float32"}, IMPL),
        ({"megatron_cfg": TE, "device": "cpu"}, IMPL),
        ({"megatron_cfg": TE | LAYERNORM}, IMPL),
        ({"megatron_cfg": ON, "precision": "float32"}, FP8),
        ({"megatron_cfg": ON, "device": "cpu"}, FP8),
        ({"megatron_cfg": ON | LAYERNORM}, FP8),
        ({"megatron_cfg": ON | {"transformer_impl": "local"}}, FP8),
        ({"megatron_cfg": {"fp8_cfg": {"fp8_recipe": "mxfp8"}}}, f"{MEG}.fp8_cfg.fp8_recipe"),
        ({"megatron_cfg": {"fp8_cfg": {"fp8_recipe": "delayed"}}}, f"{MEG}.fp8_cfg.fp8_recipe"),
        ({"megatron_cfg": {"fp8_cfg": {"fp8": "e5m2"}}}, f"{MEG}.fp8_cfg.fp8"),
        ({"megatron_cfg": {"fp8_cfg": {"fp8_param": True}}}, f"{MEG}.fp8_cfg.fp8_param"),
        ({"megatron_cfg": {"fp8_cfg": {"amax": 1}}}, f"{MEG}.fp8_cfg.amax"),
        ({"megatron_cfg": {"fp4_cfg": {"enabled": True}}}, f"{MEG}.fp4_cfg.enabled"),
        ({"megatron_cfg": ON, "make_sequence_length_divisible_by": 64}, PAD),
        ({"megatron_cfg": ON | SEQUENCE_PARALLEL, "make_sequence_length_divisible_by": 128}, PAD),
        ({"megatron_cfg": {"gradient_accumulation_fusion": True}, "device": "cpu"}, f"{MEG}.gradient_accumulation_fusion"),
        ({"megatron_cfg": {"optimizer": {"adam_impl": "transformer_engine"}}, "device": "cpu"}, ADAM),
        (
            {"megatron_cfg": {"optimizer": {"adam_impl": "torch", "use_precision_aware_optimizer": True}}},
            ADAM,
        ),
    ],
)  # fmt: skip
def test_refused(policy, where, refusals):
    named = {f"policy__{name}": value for name, value in policy.items()}
    found = refusals(**named, checkpointing__save_optimizer=False)
    assert list(found) == [where]
    assert found[where].expected and found[where].fix


@pytest.mark.parametrize(
    ("megatron", "multiple"),
    [
        ({}, 1),
        ({"fp8_cfg": {"enabled": False, "fp8_recipe": "blockwise"}}, 1),
        ({"fp8_cfg": {"enabled": True}}, 128),
        ({"fp8_cfg": {"enabled": True, "fp8_recipe": "tensorwise"}}, 16),
        ({"fp8_cfg": {"enabled": True}, "tensor_model_parallel_size": 4}, 128),
        ({"fp8_cfg": {"enabled": True}, "tensor_model_parallel_size": 4, "sequence_parallel": True}, 512),
    ],
)
def test_packs_are_padded_to_what_float8_needs(megatron, multiple, config):
    assert config(policy__megatron_cfg=megatron).policy.make_sequence_length_divisible_by == multiple


SHAPE = {
    **LLAMA,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}


@pytest.mark.parametrize(
    ("recipe", "tp", "changes", "odd"),
    [
        ("blockwise", 1, {}, None),
        ("blockwise", 2, {}, None),
        ("blockwise", 4, {}, "704 MLP channels"),  # 2816 / 4
        ("tensorwise", 4, {}, None),
        ("tensorwise", 1, {"hidden_size": 1000}, "1000 hidden channels"),
        ("blockwise", 8, {"intermediate_size": 1024, "head_dim": 64}, "64 query channels, 192 query, key"),
    ],
)
def test_the_sides_of_every_matrix(recipe, tp, changes, odd, config):
    megatron = {"fp8_cfg": {"enabled": True, "fp8_recipe": recipe}, "tensor_model_parallel_size": tp}
    found = check_layout(config(policy__megatron_cfg=megatron), parse_architecture(SHAPE | changes), None)
    assert [problem.where for problem in found] == ([] if odd is None else [FP8])
    assert odd is None or odd in found[0].expected


def test_experts_are_not_run_in_float8(config):
    experts = {**QWEN3_MOE, **SHAPE, "architectures": QWEN3_MOE["architectures"], "model_type": QWEN3_MOE["model_type"]}
    [problem] = check_layout(
        config(policy__megatron_cfg={"fp8_cfg": {"enabled": True}}), parse_architecture(experts), None
    )
    assert problem.where == FP8 and "experts" in problem.expected


def test_what_auto_came_to_is_written_beside_the_config(config, tmp_path):
    cfg = config()
    save_resolved(cfg, tmp_path / "config.yaml", {"layers": "local (no CUDA device)"})
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith("# chosen on this machine: layers: local (no CUDA device)\n")
    assert load_config(tmp_path / "config.yaml") == cfg
