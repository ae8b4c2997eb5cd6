"""Mistral and Ministral: Llama with sliding windows in all or some layers."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.windows import with_windows


@FAMILIES.add("mistral")
class Mistral(Family):
    """A window in every layer, or in those of layer_types. (With layer_types, transformers' Auto classes load it as a
    Ministral.)"""

    classes = ("MistralForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    def read(self, config: HfConfig) -> Architecture:
        return with_windows(config, super().read(config), usual=lambda number: True)


@FAMILIES.add("ministral")
class Ministral(Mistral):
    """The same with another name."""

    classes = ("MinistralForCausalLM",)
