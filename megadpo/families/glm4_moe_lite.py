"""GLM-4.7-Flash: latent attention, and GLM-4.5's router."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Experts
from megadpo.config.variants import FAMILIES
from megadpo.families.deepseek import DeepseekV3
from megadpo.families.reading import RESTORE, HfConfig


@FAMILIES.add("glm4_moe_lite")
class Glm4MoeLite(DeepseekV3):
    """mlp_layer_types says which layers are dense; without it, only the first."""

    classes = ("Glm4MoeLiteForCausalLM",)
    also_called = ()
    defaults = DeepseekV3.defaults | {
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "max_position_embeddings": 202752,
        "rms_norm_eps": 1e-5,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
    }

    def with_experts(self, config: HfConfig, arch: Architecture, experts: Experts) -> Architecture:
        kinds = config.raw.get("mlp_layer_types")
        if kinds is None:
            config.refuse(
                "first_k_dense_replace", "1: transformers reads mlp_layer_types instead", RESTORE, unless=(None, 1)
            )
            kinds = ["dense"] + ["sparse"] * (arch.num_layers - 1)
        if not isinstance(kinds, list) or len(kinds) != arch.num_layers or not set(kinds) <= {"dense", "sparse"}:
            config.report("mlp_layer_types", kinds, f"dense or sparse for each of the {arch.num_layers} layers")
            return arch
        sparse = [number for number, kind in enumerate(kinds) if kind == "sparse"]
        return arch.with_feed_forward(experts, only=sparse)
