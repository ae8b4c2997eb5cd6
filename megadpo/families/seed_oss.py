"""Seed-OSS: Llama with biases of queries, keys and values."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rows import QKV_BIAS, Row


@FAMILIES.add("seed_oss")
class SeedOss(Family):
    """Biases unless config.json says otherwise."""

    classes = ("SeedOssForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "attention_bias": True,
    }
    biases = ("attention_out_bias", "mlp_bias")

    def read(self, config: HfConfig) -> Architecture:
        return super().read(config).with_attention(qkv_bias=bool(config.get("attention_bias")))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return super().layer(arch, number) + (QKV_BIAS if arch.attention.qkv_bias else ())
