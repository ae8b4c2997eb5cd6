"""Llama, versions 2 and 3, and its look-alikes: neither biases nor other norms than a layer's two."""

from __future__ import annotations

from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family


@FAMILIES.add("llama")
class Llama(Family):
    """Queries share keys and values only where config.json says so."""

    classes = ("LlamaForCausalLM",)
    defaults = Family.defaults | {"max_position_embeddings": 2048}
