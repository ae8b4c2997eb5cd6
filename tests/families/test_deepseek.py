"""What config.json says of models with latent attention, and what is refused of it. test_equal.py holds the models."""

from __future__ import annotations

import math

import pytest

from megadpo.config import ConfigError
from megadpo.config.architecture import Experts
from megadpo.families import parse_architecture, weight_table

YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "max_position_embeddings": 163840,
    "rope_scaling": YARN,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
}
V2 = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_experts_per_tok": 6}
FLASH = {"architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite"}


def elements(raw):
    return sum(math.prod(shape) for shape in weight_table(parse_architecture(raw)).hf_shapes.values())


def test_deepseek_v3():
    arch = parse_architecture(V3)
    one, router = arch.attention, arch.experts.router
    assert (one.head_dim, one.value_dim, one.latent.rope_dim, one.latent.norm_eps) == (192, 128, 64, 1e-6)
    assert one.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert one.rotary.interleaved and one.rotary.dims == 64 and one.rotary.scaling.attention_factor == 1.0
    assert (router.groups, router.chosen_groups, router.factor, router.normalized) == (8, 4, 2.5, True)
    assert [isinstance(layer.feed_forward, Experts) for layer in arch.layers] == [False] * 3 + [True] * 58
    assert elements(V3) == 671_026_419_200  # without the layer that predicts several tokens
    assert elements(FLASH) == 29_943_393_920


def test_other_models_of_its_class():
    assert parse_architecture({**V3, "model_type": "kimi_k2"}) == parse_architecture(V3)
    moonlight = parse_architecture({**V3, "q_lora_rank": None, "rope_scaling": None, "rms_norm_eps": 1e-5})
    assert moonlight.attention.latent.q_rank is None and moonlight.attention.scale == 192**-0.5
    assert moonlight.attention.latent.norm_eps == 1e-6 and moonlight.norms.eps == 1e-5
    assert "model.layers.0.self_attn.q_proj.weight" in weight_table(moonlight).hf_shapes


def test_deepseek_v2_takes_a_groups_best():
    greedy = parse_architecture(V2).experts.router
    assert (greedy.scores, greedy.groups, greedy.correction_bias) == ("softmax", 1, False)
    said = {**V2, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    router = parse_architecture(said).experts.router
    assert (router.groups, router.chosen_groups, router.best_of_group) == (8, 3, 1)


def test_glm_flash_says_its_dense_layers_by_name():
    kinds = ["sparse", "dense", "sparse"]
    arch = parse_architecture({**FLASH, "num_hidden_layers": 3, "mlp_layer_types": kinds})
    assert [isinstance(layer.feed_forward, Experts) for layer in arch.layers] == [True, False, True]
    assert not isinstance(parse_architecture(FLASH).layers[0].feed_forward, Experts)


@pytest.mark.parametrize(
    ("raw", "said", "named"),
    [
        (V3, {"attention_bias": True}, "attention_bias"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_method": "greedy"}, "topk_method"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"n_group": None}, "n_group"),
        (V3, {"topk_group": 9}, "topk_group"),
        (V3, {"num_key_value_heads": 8}, "num_key_value_heads"),
        (V3, {"kv_lora_rank": 0}, "kv_lora_rank"),
        (V3, {"qk_rope_head_dim": "wide"}, "qk_rope_head_dim"),
        (V3, {"model_type": "deepseek_v2"}, "model_type"),
        (V3, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (V2, {"num_experts_per_tok": None}, "num_experts_per_tok"),
        (V2, {"mlp_bias": True}, "mlp_bias"),
        (FLASH, {"first_k_dense_replace": 3}, "first_k_dense_replace"),
        (FLASH, {"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types"),
        (FLASH, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(raw, said, named):
    with pytest.raises(ConfigError) as caught:
        parse_architecture({**raw, **said})
    assert named in {problem.where.removeprefix("config.json: ") for problem in caught.value.problems}
