"""GLM-4: biases of queries, keys and values; RoPE on half of each head, on pairs of neighbouring channels; gate and up
projection in one tensor on disk."""

from __future__ import annotations

import dataclasses

from megadpo.config.architecture import Architecture, Norms, Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rope import read_rope
from megadpo.families.rows import ATTENTION, JOINED_MLP, QKV_BIAS, Row, norm_row


@FAMILIES.add("glm")
class Glm(Family):
    """GLM-4-9B of 2024."""

    classes = ("GlmForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    }
    biases = ("mlp_bias",)

    def read(self, config: HfConfig) -> Architecture:
        return super().read(config).with_attention(qkv_bias=bool(config.get("attention_bias")))

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        return read_rope(config, head_dim, length, partial=True, interleaved=True)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + (QKV_BIAS if arch.attention.qkv_bias else ()) + JOINED_MLP


@FAMILIES.add("glm4")
class Glm4(Glm):
    """GLM-4-0414 and GLM-Z1: also norms after attention and MLP."""

    classes = ("Glm4ForCausalLM",)

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config)
        return dataclasses.replace(arch, norms=Norms(eps=arch.norms.eps, placement="sandwich"))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        after = (
            norm_row("self_attn_bda.norm", "post_self_attn_layernorm"),
            norm_row("mlp_bda.norm", "post_mlp_layernorm"),
        )
        return super().layer(arch, number) + after
