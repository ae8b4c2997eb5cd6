"""Qwen2 (and 2.5), with biases of queries, keys and values; Qwen3, with norms of queries and keys."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rows import QK_NORM, QKV_BIAS, Row
from megadpo.families.windows import with_windows

DEFAULTS = Family.defaults | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


@FAMILIES.add("qwen2")
class Qwen2(Family):
    """Llama with biases of queries, keys and values."""

    classes = ("Qwen2ForCausalLM",)
    defaults = DEFAULTS

    def read(self, config: HfConfig) -> Architecture:
        return qwen_windows(config, super().read(config).with_attention(qkv_bias=True))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return super().layer(arch, number) + QKV_BIAS


@FAMILIES.add("qwen3")
class Qwen3(Family):
    """Llama with a norm of each head of queries and keys."""

    classes = ("Qwen3ForCausalLM",)
    defaults = DEFAULTS | {"head_dim": 128}

    def read(self, config: HfConfig) -> Architecture:
        return qwen_windows(config, super().read(config).with_attention(qk_norm="head"))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return super().layer(arch, number) + QK_NORM


def qwen_windows(config: HfConfig, arch: Architecture) -> Architecture:
    """`arch` with its windows, if use_sliding_window: in layers from number max_window_layers on, or by layer_types."""
    if not config.get("use_sliding_window"):
        return arch
    return with_windows(config, arch, usual=lambda number: number >= config.get("max_window_layers"))
