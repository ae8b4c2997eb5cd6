"""Granite 3: Llama with four multipliers."""

from __future__ import annotations

import dataclasses

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig


@FAMILIES.add("granite")
class Granite(Family):
    """Of embeddings, of attention's scores, of what is added to the residual stream, and a divisor of logits."""

    classes = ("GraniteForCausalLM",)
    defaults = Family.defaults | {
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config).with_attention(scale=config.number("attention_multiplier"))
        return dataclasses.replace(
            arch,
            embedding_multiplier=config.number("embedding_multiplier"),
            residual_multiplier=config.number("residual_multiplier"),
            logit_divisor=config.number("logits_scaling"),
        )
