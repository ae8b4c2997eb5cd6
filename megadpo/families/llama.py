"""Llama 3 and its look-alikes, and Mistral: neither biases nor other norms than a layer's two."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig


@FAMILIES.add("llama")
class Llama(Family):
    """Queries share keys and values only where config.json says so."""

    classes = ("LlamaForCausalLM",)
    defaults = Family.defaults | {"max_position_embeddings": 2048}


@FAMILIES.add("mistral")
class Mistral(Family):
    """Llama with a window over the keys."""

    classes = ("MistralForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    def read(self, config: HfConfig) -> Architecture:
        return super().read(config).with_attention(window=window(config))


def window(config: HfConfig) -> int | None:
    """Keys that a query sees at most; None: all."""
    return None if config.get("sliding_window") is None else config.size("sliding_window")
