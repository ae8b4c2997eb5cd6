"""MiniMax-M2: a sigmoid router, RoPE on half of each head, and norms over all heads of queries and of keys."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Rotary, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import correction_bias_row, expert_rows, read_experts
from megadpo.families.family import Family
from megadpo.families.reading import RESTORE, HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import ATTENTION, QK_NORM_OF_ALL_HEADS, Row

BIAS = "e_score_correction_bias"
EXPERTS = (
    *expert_rows("block_sparse_moe", "w1", "w3", "w2"),
    correction_bias_row(f"block_sparse_moe.{BIAS}", also=f"mlp.{BIAS}"),
)
_SAID_AND_UNREAD = {
    "qk_norm_type": (None, "per_layer"),
    "scoring_func": (None, "sigmoid"),
    "use_qk_norm": (None, True),
    "use_routing_bias": (None, True),
    "shared_intermediate_size": (None, 0),
}


@FAMILIES.add("minimax_m2")
class MiniMaxM2(Family):
    """Experts in every layer."""

    classes = ("MiniMaxM2ForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "rope_theta": 5e6,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    }

    def read(self, config: HfConfig) -> Architecture:
        for key, values in _SAID_AND_UNREAD.items():
            config.refuse(key, f"{values[1]}, which is what transformers computes", RESTORE, unless=values)
        if 0 in (config.get("attn_type_list") or ()):
            config.report("attn_type_list", config.get("attn_type_list"), "1 for each layer: plain attention")
        router = Router(scores="sigmoid", correction_bias=True, normalized=True)
        experts = read_experts(config, ffn="intermediate_size", router=router)
        return super().read(config).with_feed_forward(experts).with_attention(qk_norm="width")

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        spelling, given = given_rope(config)
        turned = config.raw.get("rotary_dim")
        if turned is not None and "partial_rotary_factor" not in {*given, *config.raw}:
            given = {**given, "partial_rotary_factor": config.size("rotary_dim") / head_dim}
        return read_rope(config, head_dim, length, rope=(spelling, given), partial=True)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + QK_NORM_OF_ALL_HEADS + EXPERTS
