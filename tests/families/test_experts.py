"""What config.json says of experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megadpo.config import ConfigError
from megadpo.config.architecture import Experts, Router
from megadpo.families import parse_architecture, weight_table
from megadpo.model.moe import expert_weights
from megadpo.model.weights.hf_folder import HfWeights, StoredTensor
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


def small(name, **said):
    return parse_architecture({**LLAMA, "model_type": None, "num_hidden_layers": 5, "architectures": [name], **said})


def test_which_layers_have_experts():
    def having(arch):
        return [number for number, layer in enumerate(arch.layers) if isinstance(layer.feed_forward, Experts)]

    glm, ernie = "Glm4MoeForCausalLM", "Ernie4_5_MoeForCausalLM"
    assert having(small(glm)) == [1, 2, 3, 4] and having(small(glm, first_k_dense_replace=3)) == [3, 4]
    assert having(small(glm, first_k_dense_replace=0)) == [0, 1, 2, 3, 4]
    assert having(small(ernie)) == [1, 2, 3, 4]
    assert having(small(ernie, moe_layer_start_index=0, moe_layer_end_index=3, moe_layer_interval=2)) == [1, 3]
    assert small(glm).mixed and not small(glm, first_k_dense_replace=0).mixed
    assert small(ernie, moe_num_shared_experts=0).experts.shared_ffn_size is None


def test_groups_and_the_bias_change_the_choice_and_not_the_weights():
    """One token, four experts in two groups: by scores 0 and 2, by the bias 1 and 3, in the better group 2 and 3."""
    logits, bias = torch.tensor([[2.0, 0.0, 1.9, 1.0]]), torch.tensor([-1.0, 1.0, -1.0, 1.0])
    scores = logits.sigmoid()[0]
    for router, added, chosen in [
        (Router(scores="sigmoid", normalized=True, factor=3.0), None, [0, 2]),
        (Router(scores="sigmoid", normalized=True, factor=3.0), bias, [1, 3]),
        (Router(scores="sigmoid", normalized=True, factor=3.0, groups=2, chosen_groups=1), None, [2, 3]),
    ]:
        weights, mask = expert_weights(logits, router, 2, added)
        assert mask[0].nonzero().flatten().tolist() == chosen
        torch.testing.assert_close(weights[0, chosen], 3.0 * scores[chosen] / scores[chosen].sum())
        assert weights[0].count_nonzero() == 2


def test_layers_behind_the_last_one_are_carried_along():
    """Those that predict several tokens; others are named."""
    table = weight_table(small("Glm4MoeForCausalLM", n_routed_experts=8, num_experts_per_tok=2))
    tensors = {name: StoredTensor(Path("f"), shape, "F32") for name, shape in table.hf_shapes.items()}
    beside = StoredTensor(Path("f"), (1,), "F32")
    weights = HfWeights(Path(), {**tensors, "model.layers.5.eh_proj.weight": beside})
    assert weights.problems(table) == [] and weights.carried(table) == ["model.layers.5.eh_proj.weight"]
    (problem,) = HfWeights(Path(), {**tensors, "model.layers.50.eh_proj.weight": beside}).problems(table)
    assert "model.layers.50" in problem.where
