"""Models with experts: config.json, layouts, options."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError, check_layout
from megadpo.config.check_moe import unused_by_dense
from megadpo.families import parse_architecture
from tests.families.test_reading import LLAMA

MEG = "policy__megatron_cfg__"
QWEN3 = {
    **LLAMA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
}
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 8}
QWEN2 = {**QWEN3, "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "norm_topk_prob": False}


def test_the_three_families():
    qwen3, qwen2, mixtral = (parse_architecture(raw) for raw in (QWEN3, QWEN2, MIXTRAL))
    assert qwen3.moe.num_experts == 8 and qwen3.moe.ffn_hidden_size == 48 and qwen3.qk_norm and not qwen3.qkv_bias
    assert qwen3.moe.normalized_weights and qwen3.moe.shared_ffn_hidden_size is None
    assert qwen2.moe.shared_ffn_hidden_size == 5632 and not qwen2.moe.normalized_weights and qwen2.qkv_bias
    assert not parse_architecture({**QWEN2, "qkv_bias": False}).qkv_bias
    assert mixtral.moe.ffn_hidden_size == 128 and mixtral.moe.experts_per_token == 2 and mixtral.moe.normalized_weights
    assert (mixtral.rope_theta, mixtral.rms_norm_eps) == (1e6, 1e-5)  # transformers' own, where config.json is silent
    assert parse_architecture({**MIXTRAL, "rope_theta": 5e5}).rope_theta == 5e5
    assert parse_architecture(LLAMA).moe is None


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_what_transformers_writes_is_read_as_transformers_means_it(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{name}Config")(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    made.architectures = [f"{name}ForCausalLM"]
    for raw in (made.to_dict(), made.to_diff_dict() | {"architectures": made.architectures}):
        arch = parse_architecture(raw)
        assert arch.moe.num_experts == made.num_experts and arch.moe.experts_per_token == made.num_experts_per_tok
        assert arch.moe.ffn_hidden_size == getattr(made, "moe_intermediate_size", made.intermediate_size)
        assert arch.moe.shared_ffn_hidden_size == getattr(made, "shared_expert_intermediate_size", None)
        assert arch.moe.normalized_weights == getattr(made, "norm_topk_prob", True)
        assert (arch.rms_norm_eps, arch.rope_theta) == (made.rms_norm_eps, made.rope_parameters["rope_theta"])
        assert arch.max_position_embeddings == made.max_position_embeddings


REFUSED = [
    ({"num_experts": 0}, "num_experts"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ({"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ({"moe_intermediate_size": "many"}, "moe_intermediate_size"),
    ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ({"mlp_only_layers": [0]}, "mlp_only_layers"),
    ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ({"router_aux_loss_coef": -1}, "router_aux_loss_coef"),
]


@pytest.mark.parametrize(("said", "key"), REFUSED)
def test_refused_by_name(said, key):
    with pytest.raises(ConfigError) as caught:
        parse_architecture({**QWEN3, **said})
    assert [problem.where for problem in caught.value.problems] == [f"config.json: {key}"]


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
    assert fields(check_layout(config(**options), parse_architecture(QWEN3), world_size)) == refused


def test_shared_experts_are_cut_like_dense_layers(config):
    options = {MEG + "tensor_model_parallel_size": 2, MEG + "sequence_parallel": True}
    odd = parse_architecture({**QWEN2, "shared_expert_intermediate_size": 33})
    (problem,) = check_layout(config(**options), odd, 2)
    assert "33 MLP channels" in problem.expected
    # a dense size that no layer has does not matter
    assert check_layout(config(**options), parse_architecture({**QWEN3, "intermediate_size": 33}), 2) == []


def test_a_dense_model_refuses_expert_parallelism_and_says_what_it_leaves_unused(config):
    cfg = config(**{EP: 2, ETP: 2, MEG + "moe_token_dispatcher_type": "allgather", MEG + "freeze_moe_router": True})
    llama = parse_architecture(LLAMA)
    assert fields(check_layout(cfg, llama, 4)) == ["expert_model_parallel_size", "expert_tensor_parallel_size"]
    notes = unused_by_dense(cfg, llama)
    assert len(notes) == 2 and all("no effect: LlamaForCausalLM has no experts" in note for note in notes)
    assert unused_by_dense(config(), llama) == unused_by_dense(cfg, parse_architecture(QWEN3)) == []


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"moe_router_load_balancing_type": "aux_loss", "freeze_moe_router": True}, "moe_router_load_balancing_type"),
        ({"moe_aux_loss_coeff": 0.01}, "moe_aux_loss_coeff"),
        ({"moe_per_layer_logging": True}, "moe_per_layer_logging"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type"),
        ({"moe_router_load_balancing_type": ["aux_loss"]}, "moe_router_load_balancing_type"),
        ({"moe_token_dispatcher_type": "flex"}, "moe_token_dispatcher_type"),
        ({"moe_router_dtype": "bf16"}, "moe_router_dtype"),
    ],
)
def test_options_that_cannot_be(refusals, options, where):
    assert list(refusals(**{MEG + name: value for name, value in options.items()})) == [f"policy.megatron_cfg.{where}"]
