"""Llama, versions 2 and 3, and models with the same layers: no biases, and two norms in a layer."""

from __future__ import annotations

from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family


@FAMILIES.add("llama")
class Llama(Family):
    """Grouped-query attention only if config.json says so."""

    classes = ("LlamaForCausalLM",)
    defaults = Family.defaults | {"max_position_embeddings": 2048}
