"""What every family reads from config.json, and what is refused; one file a family adds what is its own."""

from __future__ import annotations

import json

import pytest

from megadpo.config import ConfigError
from megadpo.config.architecture import Rotary
from megadpo.config.no_effect import dropout_notes
from megadpo.families import parse_architecture, read_architecture
from tests.families.configs import LLAMA, YARN

POSITIONS = "max_position_embeddings"


def problem_keys(raw):
    with pytest.raises(ConfigError) as caught:
        parse_architecture(raw)
    return [problem.where.removeprefix("config.json: ") for problem in caught.value.problems]


def test_plain_llama():
    arch = parse_architecture({**LLAMA, "eos_token_id": [1, 2], "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5})
    attention = arch.attention
    assert (arch.family, arch.hf_class) == ("llama", "LlamaForCausalLM")
    assert (attention.head_dim, attention.value_dim, attention.num_kv_heads, attention.scale) == (16, 16, 2, 16**-0.5)
    assert (arch.eos_token_id, arch.torch_dtype, arch.norms.eps) == ((1, 2), "bfloat16", 1e-5)
    assert attention.rotary == Rotary(theta=10000.0, dims=16, scaling=None) and attention.window is None
    assert not (attention.qkv_bias or arch.tie_word_embeddings) and attention.qk_norm == "none"


@pytest.mark.parametrize(
    ("name", "family", "qkv_bias", "qk_norm"),
    [
        ("MistralForCausalLM", "mistral", False, "none"),
        ("Qwen2ForCausalLM", "qwen2", True, "none"),
        ("Qwen3ForCausalLM", "qwen3", False, "head"),
    ],
)
def test_families_differ_in_biases_and_norms(name, family, qkv_bias, qk_norm):
    arch = parse_architecture({**LLAMA, "architectures": [name], "model_type": family})
    assert (arch.family, arch.attention.qkv_bias, arch.attention.qk_norm) == (family, qkv_bias, qk_norm)


def test_without_architectures_the_model_type_decides():
    raw = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert parse_architecture({**raw, "model_type": "qwen3"}).family == "qwen3"


REFUSED = [
    ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
    ({"num_hidden_layers": 10**30, "vocab_size": 10**12}, ["num_hidden_layers", "vocab_size"]),
    ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ["architectures"]),
    ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, ["architectures"]),
    ({"architectures": [], "model_type": "bert"}, ["architectures"]),
    ({"hidden_size": None}, ["hidden_size"]),
    ({"vocab_size": "many", "num_hidden_layers": 0}, ["num_hidden_layers", "vocab_size"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
    ({"hidden_size": 65}, ["num_attention_heads"]),
    ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
    ({"hidden_act": "gelu"}, ["hidden_act"]),
    ({"attention_bias": True, "mlp_bias": True}, ["attention_bias", "mlp_bias"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}}, ["rope_scaling.long_factor"]),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": "x"}},
        ["rope_scaling.long_factor"],
    ),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [1]}},
        ["rope_scaling.short_factor"],
    ),
    ({"architectures": ["GlmForCausalLM"], "model_type": "glm", "partial_rotary_factor": 2}, ["partial_rotary_factor"]),
    ({"rope_parameters": {"rope_type": "su"}}, ["rope_parameters.rope_type"]),
    ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor"]),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, ["rope_scaling.factor"]),
    ({"rope_scaling": {"type": "linear", "factor": 2, "twist": 1}}, ["rope_scaling.twist"]),
    ({"rope_scaling": "yarn"}, ["rope_scaling"]),
    ({"rope_theta": "big"}, ["rope_theta"]),
    ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": YARN}, ["rope_scaling"]),
    ({"rope_scaling": YARN, "original_max_position_embeddings": -1}, [f"rope_scaling.original_{POSITIONS}"]),
    ({"model_type": "phi3"}, ["model_type"]),
    ({"rope_theta": -1.0}, ["rope_theta"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"layer_types": ["linear_attention"]}, ["layer_types"]),
]


@pytest.mark.parametrize(("said", "keys"), REFUSED)
def test_refused_by_name(said, keys):
    assert problem_keys({**LLAMA, **said}) == keys


OF_A_FAMILY = [
    ("HunYuanDenseV1ForCausalLM", {"use_cla": True, "use_qk_norm": False}, ["use_cla", "use_qk_norm"]),
    ("Phi3ForCausalLM", {"lm_head_bias": True}, ["lm_head_bias"]),
    ("Ernie4_5ForCausalLM", {"use_bias": True}, ["use_bias"]),
    ("SeedOssForCausalLM", {"attention_out_bias": True}, ["attention_out_bias"]),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, ["no_rope_layers"]),
    ("GraniteForCausalLM", {"logits_scaling": 0}, ["logits_scaling"]),
    ("Olmo3ForCausalLM", {"rope_parameters": {"full_attention": {"rope_type": "su"}}},
     ["rope_parameters.full_attention.rope_type"]),
    ("Glm4MoeForCausalLM", {"n_group": 3}, ["n_group"]),
    ("Glm4MoeForCausalLM", {"topk_group": 2}, ["topk_group"]),
    ("Glm4MoeForCausalLM", {"n_group": 64}, ["topk_group"]),
    ("Ernie4_5_MoeForCausalLM", {"moe_layer_start_index": 99}, ["moe_layer_start_index"]),
    ("MiniMaxM2ForCausalLM", {"scoring_func": "softmax", "attn_type_list": [0, 1]}, ["scoring_func", "attn_type_list"]),
    ("OlmoeForCausalLM", {"clip_qkv": 8.0, "sliding_window": 9}, ["clip_qkv", "sliding_window"]),
    ("GraniteMoeForCausalLM", {"num_experts_per_tok": 9}, ["num_experts_per_tok"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "said", "keys"), OF_A_FAMILY)
def test_refused_by_a_family(name, said, keys):
    raw = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert problem_keys({**raw, "architectures": [name], **said}) == keys


def test_dropout_is_never_applied_and_said_so():
    arch = parse_architecture({**LLAMA, "attention_dropout": 0.1, "residual_dropout": 0.0, "embd_pdrop": 0.1})
    assert arch.dropout == ("attention_dropout", "embd_pdrop")
    assert arch.fingerprint == parse_architecture(LLAMA).fingerprint and dropout_notes(parse_architecture(LLAMA)) == []
    (note,) = dropout_notes(arch)
    assert note.startswith("config.json: attention_dropout and embd_pdrop: no effect")


def test_a_head_of_qwen3_has_a_size_of_its_own():
    raw = {**LLAMA, "hidden_size": 66, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert "head_dim" not in raw and raw["hidden_size"] % raw["num_attention_heads"]
    assert parse_architecture(raw).attention.head_dim == 128  # transformers' default for the class


def test_unsupported_architecture_names_itself_and_the_supported_ones():
    with pytest.raises(ConfigError) as caught:
        parse_architecture({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    text = str(caught.value)
    assert all(word in text for word in ("GPT2LMHeadModel", "gpt2", "LlamaForCausalLM", "Qwen3ForCausalLM"))


def test_folder_that_cannot_be_read(tmp_path):
    for make, words in [
        (lambda: None, "existing folder"),
        (lambda: (tmp_path / "m").mkdir(), "config.json"),
        (lambda: (tmp_path / "m" / "config.json").write_text("{"), "JSON"),
        (lambda: (tmp_path / "m" / "config.json").write_text("[]"), "JSON object"),
    ]:
        make()
        with pytest.raises(ConfigError) as caught:
            read_architecture(tmp_path / "m")
        (problem,) = caught.value.problems
        assert words in problem.expected
    (tmp_path / "m" / "config.json").write_text(json.dumps(LLAMA))
    assert read_architecture(str(tmp_path / "m")).hidden_size == 64


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_transformers_writes_is_read_as_transformers_means_it(name, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    rope = {**YARN, "rope_theta": 1e6}
    made = getattr(transformers, f"{name}Config")(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=tied, rope_parameters=rope
    )
    made.architectures = [f"{name}ForCausalLM"]
    made.save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    assert arch.hidden_size == made.hidden_size and arch.num_layers == made.num_hidden_layers
    attention, scaling = arch.attention, arch.attention.rotary.scaling
    assert (attention.num_heads, attention.num_kv_heads) == (6, 3)
    assert attention.head_dim == (getattr(made, "head_dim", None) or 96 // 6)
    assert (arch.mlp.ffn_size, arch.vocab_size) == (made.intermediate_size, made.vocab_size)
    assert (arch.norms.eps, arch.max_position_embeddings) == (made.rms_norm_eps, made.max_position_embeddings)
    assert arch.tie_word_embeddings is tied
    assert attention.rotary.theta == 1e6 and scaling is not None and scaling.rope_type == "yarn"
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert scaling.attention_factor == ROPE_INIT_FUNCTIONS["yarn"](made)[1]
    assert attention.window == (made.sliding_window if name == "Mistral" else None)
    assert (arch.eos_token_id, arch.pad_token_id) == (made.eos_token_id, made.pad_token_id)
