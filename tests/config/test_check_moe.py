"""Models with experts: layouts and options."""

from __future__ import annotations

import pytest

from megadpo.config import check_layout
from megadpo.config.no_effect import without_experts
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA, QWEN2_MOE, QWEN3_MOE

MEG = "policy__megatron_cfg__"


def fields(problems):
    return [problem.where.removeprefix("policy.megatron_cfg.") for problem in problems]


SP = {MEG + "tensor_model_parallel_size": 2, MEG + "sequence_parallel": True}
EP, ETP = MEG + "expert_model_parallel_size", MEG + "expert_tensor_parallel_size"
LAYOUTS = [
    # options, processes, what is refused
    ({EP: 8}, 8, []),
    ({**SP, EP: 4, ETP: 2}, 8, []),
    ({**SP, EP: 2}, 2, []),
    ({ETP: 4}, 4, []),
    ({EP: 3}, 3, ["expert_model_parallel_size"]),
    ({ETP: 5}, 5, ["expert_tensor_parallel_size"]),
    ({MEG + "tensor_model_parallel_size": 2}, 2, ["sequence_parallel"]),
    ({EP: 4}, 6, ["expert_model_parallel_size x expert_tensor_parallel_size"]),
    ({EP: 2, ETP: 2, MEG + "pipeline_model_parallel_size": 2}, 4, ["expert_model_parallel_size x expert_tensor_parallel_size"]),
    ({MEG + "activation_checkpointing": True, MEG + "recompute_granularity": "selective",
      MEG + "recompute_modules": ["mlp", "moe", "shared_experts"]}, 1, ["recompute_modules"] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("options", "world_size", "refused"), LAYOUTS)
def test_layouts(config, options, world_size, refused):
    assert fields(check_layout(config(**options), parse_architecture(QWEN3_MOE), world_size)) == refused


def test_shared_experts_are_cut_like_dense_layers(config):
    options = {MEG + "tensor_model_parallel_size": 2, MEG + "sequence_parallel": True}
    odd = parse_architecture({**QWEN2_MOE, "shared_expert_intermediate_size": 33})
    (problem,) = check_layout(config(**options), odd, 2)
    assert "33 channels of the shared expert" in problem.expected
    # a dense size that no layer has does not matter
    assert check_layout(config(**options), parse_architecture({**QWEN3_MOE, "intermediate_size": 33}), 2) == []


def test_a_dense_model_says_once_what_of_experts_it_leaves_unused(config):
    cfg = config(**{MEG + "moe_token_dispatcher_type": "allgather", MEG + "freeze_moe_router": True,
                    MEG + "moe_router_load_balancing_type": "aux_loss"})  # fmt: skip
    llama = parse_architecture(LLAMA)
    assert check_layout(cfg, llama, 3) == []
    assert fields(check_layout(config(**{EP: 2, ETP: 2}), llama, 4)) == [
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
    ]
    dense = without_experts(cfg, llama)
    assert dense == config() and len(dense.notes) == 1
    assert "freeze_moe_router True" in dense.notes[0] and "LlamaForCausalLM has no experts" in dense.notes[0]
    assert without_experts(config(), llama).notes == ()
    assert without_experts(cfg, llama, parse_architecture(QWEN3_MOE)) is cfg, "the reference has experts"


def test_a_dense_model_recomputes_what_it_has(config):
    llama = parse_architecture(LLAMA)
    selective = {MEG + "activation_checkpointing": True, MEG + "recompute_granularity": "selective"}
    both = without_experts(config(**selective, **{MEG + "recompute_modules": ["mlp", "moe"]}), llama)
    assert both.policy.megatron_cfg.recompute_modules == ("mlp",) and "recompute_modules moe" in both.notes[0]
    none = without_experts(config(**selective, **{MEG + "recompute_modules": ["moe"]}), llama)
    assert not none.policy.megatron_cfg.activation_checkpointing


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"moe_router_load_balancing_type": "aux_loss", "freeze_moe_router": True}, "moe_router_load_balancing_type"),
        ({"moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff"),
        ({"moe_per_layer_logging": True}, "moe_per_layer_logging"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type"),
    ],
)
def test_options_that_a_model_with_experts_refuses(config, options, where):
    cfg = config(**{MEG + name: value for name, value in options.items()})
    assert fields(check_layout(cfg, parse_architecture(QWEN3_MOE), None)) == [where]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"moe_router_load_balancing_type": ["aux_loss"]}, "moe_router_load_balancing_type"),
        ({"moe_token_dispatcher_type": "flux"}, "moe_token_dispatcher_type"),
        ({"moe_router_dtype": "bf16"}, "moe_router_dtype"),
    ],
)
def test_options_that_cannot_be(refusals, options, where):
    assert list(refusals(**{MEG + name: value for name, value in options.items()})) == [f"policy.megatron_cfg.{where}"]
