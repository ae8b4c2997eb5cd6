"""ERNIE 4.5: Llama with RoPE on pairs of neighbouring channels."""

from __future__ import annotations

from megadpo.config.architecture import Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rope import read_rope


@FAMILIES.add("ernie4_5")
class Ernie45(Family):
    """Embedding and head are tied unless config.json says otherwise."""

    classes = ("Ernie4_5ForCausalLM",)
    defaults = Family.defaults | {
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
    }
    biases = ("use_bias",)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        return read_rope(config, head_dim, length, interleaved=True)
