"""Gemma's config.json, in the spelling of transformers 4 and 5, and what is refused of it. tests/families/test_equal.py
holds the models."""

from __future__ import annotations

import pytest

from megadpo.config.problems import ConfigError
from megadpo.families import parse_architecture, weight_table
from tests.families.configs import LLAMA

SMALL = {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 7}
GEMMA2 = {**SMALL, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
GEMMA = {**SMALL, "architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
LINEAR = {"rope_type": "linear", "factor": 8.0}


def test_gemma3_with_the_defaults_of_its_class():
    """What the files of the larger models leave out."""
    said = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 1024}
    arch = parse_architecture(said)
    assert (arch.num_layers, arch.hidden_size, arch.vocab_size, arch.tie_word_embeddings) == (26, 2304, 262208, True)
    assert [n for n, one in enumerate(arch.layers) if one.attention.window is None] == [5, 11, 17, 23]
    full, local = arch.layers[5].attention, arch.layers[0].attention
    assert (full.rotary.theta, local.rotary.theta, local.window) == (1e6, 1e4, 1024)
    assert full.scale == 256**-0.5 and full.qk_norm == "head" and full.logit_softcap is None
    assert arch.logit_softcap is None and arch.embedding_multiplier == 48.0 and arch.norms.zero_centred


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ],
)
def test_gemma3_turns_faster_under_windows(said):
    arch = parse_architecture({**SMALL, **said})
    full, local = arch.layers[5].attention.rotary, arch.layers[0].attention.rotary
    assert (full.theta, full.scaling.rope_type, full.scaling.factor) == (5e5, "linear", 8.0)
    assert (local.theta, local.scaling) == (2e4, None)


def test_gemma2_by_layer():
    arch = parse_architecture({**GEMMA2, "query_pre_attn_scalar": 144})
    assert [one.attention.window for one in arch.layers] == [4096, None] * 3 + [4096]
    assert (arch.attention.scale, arch.attention.logit_softcap, arch.logit_softcap) == (144**-0.5, 50.0, 30.0)
    without = parse_architecture({**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert without.attention.logit_softcap is None and without.logit_softcap is None
    names = weight_table(arch).hf_shapes
    assert sum("feedforward_layernorm" in name for name in names) == 14 and "lm_head.weight" not in names


def test_gemma_means_the_form_with_tanh():
    for activation in ("gelu", "gelu_pytorch_tanh"):
        arch = parse_architecture({**GEMMA, "hidden_act": activation})
        assert arch.mlp.activation == "gelu_tanh" and arch.norms.placement == "pre" and arch.norms.zero_centred


@pytest.mark.parametrize(
    ("raw", "said", "named"),
    [
        (GEMMA, {"hidden_act": "silu"}, "hidden_act"),
        (GEMMA, {"attention_bias": True}, "attention_bias"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA2, {"sliding_window": None}, "sliding_window"),
        (GEMMA2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (GEMMA2, {"final_logit_softcapping": -1}, "final_logit_softcapping"),
        (GEMMA2, {"layer_types": ["full_attention"] * 6}, "layer_types"),
        (SMALL, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (SMALL, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "rope_parameters"),
        (SMALL, {"rope_parameters": {"sliding_attention": 3}}, "rope_parameters"),
        (SMALL, {"rope_parameters": {"full_attention": {}}, "rope_scaling": LINEAR}, "rope_scaling"),
        (SMALL, {"rope_parameters": {"full_attention": {"rope_type": "su"}}}, "rope_type"),
        (SMALL, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(raw, said, named):
    with pytest.raises(ConfigError, match=named):
        parse_architecture({**raw, **said})
