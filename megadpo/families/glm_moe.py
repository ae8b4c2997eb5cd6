"""GLM-4.5, 4.5-Air, 4.6 and 4.7: a sigmoid router, a shared expert, and dense layers first."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Mlp, Rotary, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import correction_bias_row, expert_rows, read_experts, shared_expert_rows
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rope import read_rope
from megadpo.families.rows import ATTENTION, QK_NORM, QKV_BIAS, Row

EXPERTS = (
    *expert_rows(),
    *shared_expert_rows("mlp.shared_experts"),
    correction_bias_row("mlp.gate.e_score_correction_bias"),
)


def sigmoid_router(config: HfConfig) -> Router:
    """DeepSeek-V3's router, by its keys in config.json."""
    return Router(
        scores="sigmoid",
        correction_bias=True,
        groups=config.size("n_group"),
        chosen_groups=config.size("topk_group"),
        normalized=bool(config.get("norm_topk_prob")),
        least_sum=1e-20,
        factor=config.number("routed_scaling_factor"),
    )


@FAMILIES.add("glm4_moe")
class Glm4Moe(Family):
    """Multi-token-prediction layers (MTP), which files have after the others, are kept but not trained."""

    classes = ("Glm4MoeForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "router_aux_loss_coef": 0.0,
    }
    biases = ("mlp_bias",)

    def read(self, config: HfConfig) -> Architecture:
        shared = config.size("n_shared_experts") * config.size("moe_intermediate_size")
        experts = read_experts(
            config,
            count="n_routed_experts",
            router=sigmoid_router(config),
            shared_ffn_size=shared,
            shared_gate=False,
        )
        arch = super().read(config)
        dense = config.size("first_k_dense_replace", least=0)
        return arch.with_feed_forward(experts, only=range(dense, arch.num_layers)).with_attention(
            qkv_bias=bool(config.get("attention_bias")), qk_norm="head" if config.get("use_qk_norm") else "none"
        )

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        return read_rope(config, head_dim, length, partial=True)

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return (f"model.layers.{arch.num_layers}.*",)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        biases = QKV_BIAS if arch.attention.qkv_bias else ()
        norms = QK_NORM if arch.attention.qk_norm == "head" else ()
        if isinstance(arch.layers[number].feed_forward, Mlp):
            return super().layer(arch, number) + biases + norms
        return ATTENTION + biases + norms + EXPERTS
