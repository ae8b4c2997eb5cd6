"""Layouts: what must hold of the config alone, with the model's shape, and with the processes."""

from __future__ import annotations

import dataclasses

import pytest

from megadpo.config import check_layout, layers_per_stage, stated_world_size
from megadpo.config.architecture import Mlp, RopeScaling, Rotary
from megadpo.families import parse_architecture

LLAMA_8B = parse_architecture(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
)
MEG = "policy__megatron_cfg__"
TP = MEG + "tensor_model_parallel_size"
PP = MEG + "pipeline_model_parallel_size"
CP = MEG + "context_parallel_size"
TP_FIELD, PP_FIELD = TP.replace("__", "."), PP.replace("__", ".")
VPP = MEG + "virtual_pipeline_model_parallel_size"
UNIFORM, UNIFORM_LAYERS = {MEG + "activation_checkpointing": True}, MEG + "recompute_num_layers"
UNIFORM_FIELD = "policy.megatron_cfg.recompute_num_layers"
VPP_FIELD = VPP.replace("__", ".")
FIRST, LAST = MEG + "num_layers_in_first_pipeline_stage", MEG + "num_layers_in_last_pipeline_stage"


LONGROPE = Rotary(
    theta=1e4,
    dims=2,
    scaling=RopeScaling(rope_type="longrope", factor=32.0, original_max_position_embeddings=4096, short_factor=(1.0,)),
)


def of_shape(shape):
    """Llama 8B with other sizes."""
    arch, others = LLAMA_8B, dict(shape)
    attention = {name: others.pop(name) for name in ("num_heads", "num_kv_heads", "window", "rotary") if name in others}
    if "ffn_size" in others:
        arch = arch.with_feed_forward(Mlp(ffn_size=others.pop("ffn_size")))
    return dataclasses.replace(arch.with_attention(**attention), **others)


POSSIBLE = [
    ({}, {}, 1),
    ({TP: 4, PP: 2}, {}, 8),
    ({TP: 8, PP: 4}, {}, 64),
    ({TP: 8}, {}, None),
    ({TP: 2, PP: 2, CP: 4}, {}, 32),
    ({PP: 3, FIRST: 10}, {}, 3),
    ({PP: 2, FIRST: 15, LAST: 17}, {}, 2),
    ({PP: 4, FIRST: 7, LAST: 5}, {}, 4),
    ({TP: 2}, {"tie_word_embeddings": True}, 2),
    ({PP: 4, VPP: 4}, {}, 4),
    ({**UNIFORM, UNIFORM_LAYERS: 4, PP: 2, VPP: 4}, {}, 2),
    ({UNIFORM_LAYERS: 3}, {}, 1),
    ({**UNIFORM, UNIFORM_LAYERS: 3, MEG + "recompute_method": "block"}, {}, 1),
    ({PP: 2, VPP: 4, FIRST: 12}, {}, 2),
    ({PP: 2, VPP: 2, "policy__sequence_packing__enabled": False}, {}, 2),
    ({"policy__max_total_sequence_length": 131072}, {}, 1),
    ({"policy__max_total_sequence_length": 9000}, {"window": 4096}, 1),
    ({"policy__max_total_sequence_length": 4096}, {"rotary": LONGROPE}, 1),
    ({"policy__train_global_batch_size": 3}, {}, 3),
    ({"policy__train_global_batch_size": 8, "policy__sequence_packing__enabled": False}, {}, 4),
    ({"cluster__gpus_per_node": 4, "cluster__num_nodes": 2}, {}, 8),
]


@pytest.mark.parametrize(("changes", "shape", "world"), POSSIBLE)
def test_possible_layout(config, changes, shape, world):
    assert check_layout(config(**changes), of_shape(shape), world) == []


IMPOSSIBLE = [
    # config changes, shape changes, world size, fields refused, words of the first problem
    ({TP: 16}, {}, 16, [TP_FIELD], "8 key-value heads"),
    ({TP: 2, CP: 4}, {}, 4, [f"{TP_FIELD} x pipeline_model_parallel_size x context_parallel_size"], "4 processes"),
    (
        {TP: 3},
        {"num_heads": 12, "num_kv_heads": 4, "ffn_size": 12, "vocab_size": 12},
        3,
        [TP_FIELD],
        "key-value",
    ),
    ({TP: 2}, {"vocab_size": 32001}, 2, [TP_FIELD], "32001 vocabulary entries"),
    ({TP: 4}, {"ffn_size": 130}, 4, [TP_FIELD], "130 MLP channels"),
    ({TP: 5}, {}, 5, [TP_FIELD] * 4, "32 attention heads"),
    ({PP: 5}, {}, 5, [PP_FIELD], "32 layers"),
    ({PP: 64}, {}, 64, [PP_FIELD], "32 layers"),
    ({PP: 4, FIRST: 9}, {}, 4, [PP_FIELD], "num_layers_in_first_pipeline_stage (9)"),
    ({PP: 2, FIRST: 10, LAST: 10}, {}, 2, [PP_FIELD], "num_layers_in_last_pipeline_stage (10)"),
    ({PP: 3, FIRST: 16, LAST: 16}, {}, 3, [PP_FIELD], "32 layers"),
    ({PP: 2, FIRST: 40}, {}, 2, [PP_FIELD], "32 layers"),
    ({PP: 4, VPP: 3}, {}, 4, [VPP_FIELD], "8 + 8 + 8 + 8"),
    ({PP: 2, VPP: 4, FIRST: 14}, {}, 2, [VPP_FIELD], "14 + 18"),
    (
        {PP: 4, VPP: 2, "policy__train_global_batch_size": 12, "policy__sequence_packing__enabled": False},
        {},
        4,
        ["policy.train_global_batch_size"],
        "multiple of 8",
    ),
    (
        {"policy__max_total_sequence_length": 9000},
        {"max_position_embeddings": 8192},
        1,
        ["policy.max_total_sequence_length"],
        "8192",
    ),
    (
        {"policy__max_total_sequence_length": 9000},
        {"rotary": LONGROPE},
        1,
        ["policy.max_total_sequence_length"],
        "4096",
    ),
    ({**UNIFORM, UNIFORM_LAYERS: 3}, {}, 1, [UNIFORM_FIELD], "here 32"),
    ({**UNIFORM, UNIFORM_LAYERS: 4, PP: 2, FIRST: 10}, {}, 2, [UNIFORM_FIELD], "every pipeline stage, here 10 + 22"),
    ({**UNIFORM, UNIFORM_LAYERS: 8, PP: 2, VPP: 4}, {}, 2, [UNIFORM_FIELD], "chunk of a pipeline stage, here 4 + 4"),
    ({**UNIFORM, UNIFORM_LAYERS: 2, PP: 2, VPP: 3}, {}, 2, [VPP_FIELD], "16 + 16"),
    ({TP: 2}, {}, 3, [TP_FIELD + " x pipeline_model_parallel_size"], "3 processes"),
    ({TP: 4, PP: 2}, {}, 4, [TP_FIELD + " x pipeline_model_parallel_size"], "4 processes"),
    ({"policy__train_global_batch_size": 3}, {}, 4, ["policy.train_global_batch_size"], "at least 4"),
    (
        {"policy__train_global_batch_size": 12, "policy__sequence_packing__enabled": False},
        {},
        4,
        ["policy.train_global_batch_size"],
        "multiple of 8",
    ),
    ({"cluster__gpus_per_node": 8, "cluster__num_nodes": 1}, {}, 2, ["cluster.num_nodes x gpus_per_node"], "2"),
]


@pytest.mark.parametrize(("changes", "shape", "world", "fields", "words"), IMPOSSIBLE)
def test_impossible_layout(config, changes, shape, world, fields, words):
    problems = check_layout(config(**changes), of_shape(shape), world)
    assert [problem.where for problem in problems] == fields
    assert words in problems[0].expected
    assert all(problem.fix for problem in problems)


def test_everything_at_once(config):
    cfg = config(**{TP: 16, PP: 5, "policy__max_total_sequence_length": 10**6})
    problems = check_layout(cfg, LLAMA_8B, 7)
    assert len(problems) == 4
    fix = next(problem.fix for problem in problems if problem.where == TP_FIELD)
    assert fix == "set it to 1 or 2 or 4 or 8"


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({PP: 5}, "set it to one of 1, 2, 4, 8, 16, 32, or choose"),
        ({PP: 2, VPP: 3}, "set it to 1 or 2 or 4 or 8 or 16, or divide"),
        ({**UNIFORM, UNIFORM_LAYERS: 5, PP: 2, VPP: 2}, "set it to 1 or 2 or 4 or 8, or recompute_method"),
    ],
)
def test_a_fix_names_every_number_that_is_possible(config, changes, fix):
    [problem] = check_layout(config(**changes), LLAMA_8B, None)
    assert problem.fix.startswith(fix)


def test_what_is_not_known_is_not_checked(config):
    impossible = config(**{TP: 16, PP: 5})
    assert check_layout(impossible, None, None) == []
    assert len(check_layout(impossible, None, 7)) == 1


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, [32]),
        ({PP: 4}, [8, 8, 8, 8]),
        ({PP: 3, FIRST: 10}, [10, 11, 11]),
        ({PP: 3, LAST: 10}, [11, 11, 10]),
        ({PP: 4, FIRST: 7, LAST: 5}, [7, 10, 10, 5]),
        ({PP: 2, FIRST: 15, LAST: 17}, [15, 17]),
        ({PP: 5}, None),
        ({PP: 3, FIRST: 16, LAST: 16}, None),
    ],
)
def test_layers_per_stage(config, changes, stages):
    assert layers_per_stage(config(**changes), 32) == stages


def test_sizes_of_the_world(config):
    cfg = config(**{TP: 2, PP: 2, "cluster__gpus_per_node": 8, "cluster__num_nodes": 3})
    assert stated_world_size(cfg) == 24
    assert stated_world_size(config()) is None


OPT = MEG + "optimizer__"
DDP = MEG + "distributed_data_parallel_config__"
SELECTIVE = {MEG + "activation_checkpointing": True, MEG + "recompute_granularity": "selective"}

BROKEN = [
    # changes, where, words of `expected`
    ({MEG + "sequence_parallel": True}, "policy.megatron_cfg.sequence_parallel", "tensor_model_parallel_size 1"),
    (
        {
            MEG + "sequence_parallel": True,
            MEG + "tensor_model_parallel_size": 4,
            "policy__make_sequence_length_divisible_by": 6,
        },
        "policy.make_sequence_length_divisible_by",
        "multiple of tensor_model_parallel_size (4)",
    ),
    (
        {MEG + "context_parallel_size": 4, "policy__make_sequence_length_divisible_by": 2},
        "policy.make_sequence_length_divisible_by",
        "multiple of context_parallel_size (4)",
    ),
    (
        {
            MEG + "context_parallel_size": 2,
            MEG + "sequence_parallel": True,
            MEG + "tensor_model_parallel_size": 2,
            "policy__make_sequence_length_divisible_by": 2,
        },
        "policy.make_sequence_length_divisible_by",
        "multiple of context_parallel_size (2) x tensor_model_parallel_size (2)",
    ),
    (
        {
            MEG + "context_parallel_size": 1024,
            "policy__max_total_sequence_length": 512,
            "policy__sequence_packing__train_mb_tokens": 1000,
        },
        "policy.sequence_packing.train_mb_tokens",
        "at least 1024",
    ),
    ({MEG + "num_layers_in_first_pipeline_stage": 3}, "policy.megatron_cfg.num_layers_in_first_pipeline_stage", "null"),
    ({MEG + "num_layers_in_last_pipeline_stage": 3}, "policy.megatron_cfg.num_layers_in_last_pipeline_stage", "null"),
    (
        {DDP + "overlap_param_gather": True},
        "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
        "overlap_grad_reduce",
    ),
    (
        {
            DDP + "overlap_param_gather": True,
            DDP + "overlap_grad_reduce": True,
            OPT + "use_distributed_optimizer": False,
        },
        "policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather",
        "use_distributed_optimizer",
    ),
    ({VPP: 2}, "policy.megatron_cfg.virtual_pipeline_model_parallel_size", "1 with pipeline_model_parallel_size 1"),
    ({PP: 2, VPP: 4, FIRST: 12, LAST: 20}, "policy.megatron_cfg.num_layers_in_last_pipeline_stage", "null with two"),
    ({**SELECTIVE, MEG + "recompute_method": "block"}, "policy.megatron_cfg.recompute_method", "no use"),
    ({**SELECTIVE, MEG + "recompute_num_layers": 2}, "policy.megatron_cfg.recompute_num_layers", "no use"),
    (
        {MEG + "activation_checkpointing": True, MEG + "recompute_modules": ["mlp"]},
        "policy.megatron_cfg.recompute_modules",
        "no use",
    ),
    ({**SELECTIVE, MEG + "recompute_modules": []}, "policy.megatron_cfg.recompute_modules", "at least one module"),
]


@pytest.mark.parametrize(("changes", "where", "expected"), BROKEN)
def test_broken_rule(refusals, changes, where, expected):
    found = refusals(**changes)
    assert list(found) == [where]
    assert expected in found[where].expected
    assert found[where].fix


KEPT = [
    {MEG + "pipeline_model_parallel_size": 2, VPP: 2},
    {MEG + "virtual_pipeline_model_parallel_size": None, "policy__freeze": None},
    {MEG + "sequence_parallel": True, MEG + "tensor_model_parallel_size": 2},
    {MEG + "pipeline_model_parallel_size": 2, MEG + "num_layers_in_first_pipeline_stage": 3},
    {DDP + "overlap_param_gather": True, DDP + "overlap_grad_reduce": True},
    {**SELECTIVE, MEG + "recompute_modules": ["mlp"]},
    {MEG + "activation_checkpointing": True, MEG + "recompute_method": "block", MEG + "recompute_num_layers": 2},
    {MEG + "recompute_modules": ["mlp"], MEG + "recompute_method": "block"},
]


@pytest.mark.parametrize("changes", KEPT)
def test_what_the_rules_allow(config, changes):
    assert config(**changes).notes == ()
