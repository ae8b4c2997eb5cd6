"""Qwen3-Next: experts behind gated delta nets and, in every fourth layer, attention with an output gate."""

from __future__ import annotations

from typing import ClassVar

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.delta_net import DeltaNetFamily
from megadpo.families.experts import expert_rows, read_experts, refuse_dense_layers
from megadpo.families.qwen_moe import SHARED_EXPERT
from megadpo.families.reading import HfConfig


@FAMILIES.add("qwen3_next")
class Qwen3Next(DeltaNetFamily):
    """Its delta nets have two projections, key head by key head. Layers that predict several tokens (mtp) are carried along
    untrained."""

    classes = ("Qwen3NextForCausalLM",)
    defaults = DeltaNetFamily.defaults | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    }
    in_proj: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "linear_attn.in_proj_qkvz.weight": "ih",
        "linear_attn.in_proj_ba.weight": "jh",
    }
    feed_forward = (*expert_rows(), *SHARED_EXPERT)

    def read(self, config: HfConfig) -> Architecture:
        refuse_dense_layers(config)
        experts = read_experts(config, shared_ffn_size=config.size("shared_expert_intermediate_size"))
        return super().read(config).with_feed_forward(experts)
