"""Qwen2 (2.5 too) and Qwen3: one has biases on queries, keys and values, the other norms on queries and keys."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.llama import window
from megadpo.families.reading import HfConfig
from megadpo.families.rows import QK_NORM, QKV_BIAS, Row

DEFAULTS = Family.defaults | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}


@FAMILIES.add("qwen2")
class Qwen2(Family):
    """Llama with biases on queries, keys and values."""

    classes = ("Qwen2ForCausalLM",)
    defaults = DEFAULTS

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config)
        return arch.with_attention(qkv_bias=True, window=qwen_window(config, arch.num_layers))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return super().layer(arch, number) + QKV_BIAS


@FAMILIES.add("qwen3")
class Qwen3(Family):
    """Llama with a norm on each head of queries and keys."""

    classes = ("Qwen3ForCausalLM",)
    defaults = DEFAULTS | {"head_dim": 128}

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config)
        return arch.with_attention(qk_norm="head", window=qwen_window(config, arch.num_layers))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return super().layer(arch, number) + QK_NORM


def qwen_window(config: HfConfig, num_layers: int | None = None) -> int | None:
    """The window, where any layer has one. `layer_types` says which layers do; without it, those from number
    `max_window_layers` on. num_layers: of the model; None in the MoE classes, where some layer always has the window."""
    if not config.get("use_sliding_window"):
        return None
    types = config.get("layer_types")
    if types is not None:
        slides = "sliding_attention" in types
    else:
        slides = num_layers is None or config.get("max_window_layers") < num_layers
    return window(config) if slides else None
