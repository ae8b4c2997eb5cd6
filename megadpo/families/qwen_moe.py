"""Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with experts in every layer."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import expert_rows, read_experts, refuse_dense_layers, shared_expert_rows
from megadpo.families.family import Family
from megadpo.families.layouts import Replicated
from megadpo.families.qwen import DEFAULTS
from megadpo.families.reading import HfConfig
from megadpo.families.rows import ATTENTION, QK_NORM, QKV_BIAS, Row
from megadpo.families.windows import window, with_windows

SHARED_EXPERT = (
    *shared_expert_rows("mlp.shared_expert"),
    Row("mlp.shared_experts.gate_weight", Replicated(), {"mlp.shared_expert_gate.weight": "1h"}),
)


@FAMILIES.add("qwen2_moe")
class Qwen2Moe(Family):
    """Biases of queries, keys and values unless config.json says otherwise; a shared expert with a gate."""

    classes = ("Qwen2MoeForCausalLM",)
    defaults = DEFAULTS | {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "router_aux_loss_coef": 0.001,
        "qkv_bias": True,
    }

    def read(self, config: HfConfig) -> Architecture:
        refuse_dense_layers(config)
        experts = read_experts(config, shared_ffn_size=config.size("shared_expert_intermediate_size"))
        arch = super().read(config).with_feed_forward(experts)
        arch = arch.with_attention(qkv_bias=bool(config.get("qkv_bias")))
        if not config.get("use_sliding_window"):
            return arch
        # unlike Qwen2: every second layer below max_window_layers
        return with_windows(
            config, arch, usual=lambda number: number % 2 == 0 and number < config.get("max_window_layers")
        )

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + (QKV_BIAS if arch.attention.qkv_bias else ()) + expert_rows() + SHARED_EXPERT


@FAMILIES.add("qwen3_moe")
class Qwen3Moe(Family):
    """A norm of each head of queries and keys."""

    classes = ("Qwen3MoeForCausalLM",)
    defaults = DEFAULTS | {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "router_aux_loss_coef": 0.001,
    }

    def read(self, config: HfConfig) -> Architecture:
        refuse_dense_layers(config)
        arch = super().read(config).with_feed_forward(read_experts(config))
        # in every layer, for any max_window_layers
        size = window(config) if config.get("use_sliding_window") else None
        return arch.with_attention(qk_norm="head", window=size)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + QK_NORM + expert_rows()
