"""What config.json says of experts."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA, MIXTRAL, QWEN2_MOE, QWEN3_MOE


def test_the_three_families():
    qwen3, qwen2, mixtral = (parse_architecture(raw) for raw in (QWEN3_MOE, QWEN2_MOE, MIXTRAL))
    assert qwen3.moe.num_experts == 8 and qwen3.moe.ffn_hidden_size == 48 and qwen3.qk_norm and not qwen3.qkv_bias
    assert qwen3.moe.normalized_weights and qwen3.moe.shared_ffn_hidden_size is None
    assert qwen2.moe.shared_ffn_hidden_size == 5632 and not qwen2.moe.normalized_weights and qwen2.qkv_bias
    assert not parse_architecture({**QWEN2_MOE, "qkv_bias": False}).qkv_bias
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
        parse_architecture({**QWEN3_MOE, **said})
    assert [problem.where for problem in caught.value.problems] == [f"config.json: {key}"]
