"""DeepSeek-V2 (V2-Lite, Coder-V2) and DeepSeek-V3 (R1, Kimi-K2, Moonlight)."""

from __future__ import annotations

from typing import ClassVar

from megadpo.config.architecture import Architecture, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import correction_bias_row
from megadpo.families.family import Family
from megadpo.families.glm_moe import sigmoid_router
from megadpo.families.latent import LatentFamily
from megadpo.families.reading import RESTORE, HfConfig

_DEFAULTS = Family.defaults | {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_interleave": True,
    "router_aux_loss_coef": 0.0,
}


@FAMILIES.add("deepseek_v2")
class DeepseekV2(LatentFamily):
    """The router is a softmax over all experts. A group's score is that of its best expert."""

    classes = ("DeepseekV2ForCausalLM",)
    defaults = _DEFAULTS | {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    }

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("rope_interleave", "true: transformers rotates neighbouring channels", RESTORE, unless=(True,))
        config.refuse("norm_topk_prob", "false: transformers never divides by the sum", RESTORE)
        config.refuse("scoring_func", "softmax", RESTORE, unless=("softmax",))
        return super().read(config)

    def router(self, config: HfConfig) -> Router:
        methods = ("greedy", "group_limited_greedy")
        config.refuse("topk_method", " or ".join(methods), RESTORE, unless=methods)
        factor = config.number("routed_scaling_factor")
        if config.get("topk_method") == "greedy":
            return Router(scores="softmax", factor=factor)
        return Router(
            scores="softmax",
            factor=factor,
            groups=config.size("n_group"),
            chosen_groups=config.size("topk_group"),
            best_of_group=1,
        )


@FAMILIES.add("deepseek_v3")
class DeepseekV3(LatentFamily):
    """Multi-token-prediction layers (MTP), which files have after the others, are kept but not trained."""

    classes = ("DeepseekV3ForCausalLM",)
    also_called: ClassVar[tuple[str, ...]] = ("kimi_k2",)
    defaults = _DEFAULTS | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }
    expert_rows = (*LatentFamily.expert_rows, correction_bias_row("mlp.gate.e_score_correction_bias"))

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("scoring_func", "sigmoid", RESTORE, unless=("sigmoid",))
        config.refuse("topk_method", "noaux_tc", RESTORE, unless=("noaux_tc",))
        return super().read(config)

    def router(self, config: HfConfig) -> Router:
        return sigmoid_router(config)
