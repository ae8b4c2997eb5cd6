"""Small models of every class that a family here has, for tests/families/test_equal.py: configs of the real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LAYERS, HEADS, GROUPS, WINDOW = 4, 4, 2, 5
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,  # transformers gives the embedding of such a token no gradient
}
WIDER = {"head_dim": 12}  # heads wider together than the hidden size
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
          "original_max_position_embeddings": 16}  # fmt: skip
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 2.5,
               "tie_word_embeddings": True}  # fmt: skip
TIED = {"tie_word_embeddings": True}
LATENT = {"num_key_value_heads": HEADS, "q_lora_rank": 20, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
          "v_head_dim": 10, "moe_intermediate_size": 16, "num_experts_per_tok": 2}  # fmt: skip
TYPES = ["sliding_attention", "full_attention"] * 2

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # name of a case: model_type, what its config has beside SIZES
    "llama": ("llama", {**WIDER, "rope_parameters": LLAMA3}),
    "llama2": ("llama", {"num_key_value_heads": HEADS, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "ministral": ("ministral", {**WIDER, "sliding_window": WINDOW, "layer_types": TYPES}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**WIDER, "rope_parameters": YARN}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, **WIDER, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": ("minimax_m2", {**WIDER, "rotary_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": (
        "glm4_moe",
        {**WIDER, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_interval": 2,
         "tie_word_embeddings": True},
    ),
    "granite_moe": ("granitemoe", {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granite_moe_shared": (
        "granitemoeshared",
        {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32},
    ),
    "seed_oss": ("seed_oss", {**WIDER, "attention_dropout": 0.1, "residual_dropout": 0.1}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi3_longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.5], "long_factor": [1.0, 4.0, 9.0],
                                "partial_rotary_factor": 0.75, "rope_theta": 1e4},
        },
    ),
    "granite": ("granite", MULTIPLIERS),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3_windows": ("smollm3", {"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 5}),
    "ernie4_5": ("ernie4_5", {**WIDER, "tie_word_embeddings": True}),
    "glm": ("glm", {**WIDER}),
    "glm4": ("glm4", {**WIDER}),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {"sliding_window": WINDOW,
         "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
    ),
    "hunyuan": (
        "hunyuan_v1_dense",
        {**WIDER, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}},
    ),
    "gemma": ("gemma", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 11, "sliding_window": WINDOW,
         "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 11, "sliding_window": WINDOW,
         "sliding_window_pattern": 2, "final_logit_softcapping": 2.0,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, "first_k_dense_replace": 1, "n_routed_experts": 6, "topk_method": "group_limited_greedy", "n_group": 3,
         "topk_group": 2, "routed_scaling_factor": 3.0,
         "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1}},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {**LATENT, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_group": 4, "topk_group": 2,
         "rope_parameters": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
    ),
    "deepseek_v3_dense": (  # queries without a latent, as in Moonlight
        "deepseek_v3",
        {**LATENT, "first_k_dense_replace": LAYERS, "q_lora_rank": None, "rms_norm_eps": 1e-3, "rope_interleave": False},
    ),
    "moonlight": (  # with 8 experts float32 alone takes transformers 0.9e-5 from float64, and us half of that
        "deepseek_v3",
        {**LATENT, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
         "rms_norm_eps": 1e-3, "rope_interleave": False},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {**LATENT, "v_head_dim": 20, "n_routed_experts": 8, "mlp_layer_types": ["dense", "sparse", "dense", "sparse"]},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "intermediate_size": 64, "sliding_window": WINDOW, "num_local_experts": 4, "swiglu_limit": 1.5,
         "num_experts_per_tok": 2, "rope_parameters": {**YARN, "truncate": False}},
    ),
}  # fmt: skip


DELTA_NET = {  # the norms' large epsilon keeps float32's rounding small: a state's values are, before they are normed
    "head_dim": 16, "layer_types": ["linear_attention", "full_attention"] * 2, "rms_norm_eps": 1e-2,
    "linear_conv_kernel_dim": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "mrope_interleaved": True,
                             "rope_theta": 1e3, "partial_rotary_factor": 0.25}}  # fmt: skip
CASES |= {
    "qwen3_next": ("qwen3_next", {**DELTA_NET, **EXPERTS, **SHARED}),
    "qwen3_5": (
        "qwen3_5_text",
        {**DELTA_NET, **MROPE, "linear_conv_kernel_dim": 3, "linear_num_value_heads": 2},
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA_NET, **MROPE, **EXPERTS, **SHARED}),
}

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
CASES |= {
    "mistral3": (
        "mistral3",
        {"text_config": {"model_type": "mistral", "head_dim": 12, "sliding_window": None, **TIED},
         "vision_config": {"model_type": "pixtral", "image_size": 8, "patch_size": 4, "head_dim": 8, **VISION}, **TIED},
    ),
    "qwen2_5_vl": (
        "qwen2_5_vl",
        {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
         "vision_config": TOWER},
    ),
    "qwen3_5_vision": (
        "qwen3_5",
        {"text_config": {**DELTA_NET, **MROPE, **TIED},
         "vision_config": {**TOWER, "patch_size": 4, "num_position_embeddings": 16}, **TIED},
    ),
    "qwen3_5_moe_vision": (
        "qwen3_5_moe",
        {"text_config": {**DELTA_NET, **EXPERTS, **SHARED}, "vision_config": {**TOWER, "patch_size": 4}},
    ),
    "gemma3_vision": (
        "gemma3",
        {"text_config": {"head_dim": 16, "query_pre_attn_scalar": 11, "sliding_window": WINDOW, "layer_types": TYPES, **TIED},
         "vision_config": {"image_size": 8, "patch_size": 4, **VISION}, "mm_tokens_per_image": 4, **TIED},
    ),
}  # fmt: skip


def config_of(case: str) -> dict[str, Any]:
    """config.json of `case`."""
    config = _config(case)
    return {**config.to_dict(), "architectures": [_class(config).__name__]}


def _config(case: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    model_type, own = CASES[case]
    if "text_config" in own:
        return AutoConfig.for_model(model_type, **{**own, "text_config": {**SIZES, **own["text_config"]}})
    return AutoConfig.for_model(model_type, **{**SIZES, **own, **changes})


def _class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    vision = hasattr(config, "vision_config")
    return (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if vision else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]


def make_case(folder: Path, case: str, **changes: Any) -> Path:
    """Save a random model of `case`, with `changes` in its config, in float32. Norms, biases and the like are random too: their
    first values are all alike, and would hide which is which. So are routers' correction biases, large enough to change
    the choice. Linear attention remembers some tokens, not the last one alone."""
    config = _config(case, **changes)
    model = _class(config)._from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        corrections = [one for name, one in model.named_buffers() if name.endswith("correction_bias")]
        decays = {id(one) for name, one in model.named_parameters() if name.endswith("A_log")}
        for parameter in (*model.parameters(), *corrections):
            mean = 1.0 if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.0
            mean = -1.0 if id(parameter) in decays else mean
            parameter.copy_(mean + torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(folder)
    return folder
