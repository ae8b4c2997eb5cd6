"""What config.json says of experts."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA, MIXTRAL, QWEN2_MOE, QWEN3_MOE


def test_the_three_families():
    qwen3, qwen2, mixtral = (parse_architecture(raw) for raw in (QWEN3_MOE, QWEN2_MOE, MIXTRAL))
    assert qwen3.experts.number == 8 and qwen3.experts.mlp.ffn_size == 48 and qwen3.mlp is None
    assert qwen3.attention.qk_norm == "head" and not qwen3.attention.qkv_bias
    assert qwen3.experts.router.scores == "softmax_of_chosen" and qwen3.experts.shared_ffn_size is None
    assert qwen2.experts.shared_ffn_size == 5632 and qwen2.experts.router.scores == "softmax"
    assert qwen2.attention.qkv_bias and not parse_architecture({**QWEN2_MOE, "qkv_bias": False}).attention.qkv_bias
    assert mixtral.experts.mlp.ffn_size == 128 and mixtral.experts.per_token == 2
    assert mixtral.experts.router.scores == "softmax_of_chosen"
    assert (mixtral.attention.rotary.theta, mixtral.norms.eps) == (
        1e6,
        1e-5,
    )  # transformers' own, where config.json is silent
    assert parse_architecture({**MIXTRAL, "rope_theta": 5e5}).attention.rotary.theta == 5e5
    assert parse_architecture(LLAMA).experts is None


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_what_transformers_writes_is_read_as_transformers_means_it(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{name}Config")(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    made.architectures = [f"{name}ForCausalLM"]
    for raw in (made.to_dict(), made.to_diff_dict() | {"architectures": made.architectures}):
        arch = parse_architecture(raw)
        assert arch.experts.number == made.num_experts and arch.experts.per_token == made.num_experts_per_tok
        assert arch.experts.mlp.ffn_size == getattr(made, "moe_intermediate_size", made.intermediate_size)
        assert arch.experts.shared_ffn_size == getattr(made, "shared_expert_intermediate_size", None)
        assert (arch.experts.router.scores == "softmax_of_chosen") == getattr(made, "norm_topk_prob", True)
        assert arch.norms.eps == made.rms_norm_eps
        assert arch.attention.rotary.theta == made.rope_parameters["rope_theta"]
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
