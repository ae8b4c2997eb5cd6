"""Mixtral: Mistral with experts."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import expert_rows, read_experts
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rows import ATTENTION, Row
from megadpo.families.windows import window


@FAMILIES.add("mixtral")
class Mixtral(Family):
    """Experts in every layer. The weights of a token's experts have the sum 1."""

    classes = ("MixtralForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    }

    def read(self, config: HfConfig) -> Architecture:
        experts = read_experts(config, ffn="intermediate_size", router=Router(scores="softmax_of_chosen"))
        return super().read(config).with_feed_forward(experts).with_attention(window=window(config))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + expert_rows("block_sparse_moe", "w1", "w3", "w2")
