"""Phi-3 and Phi-4: Llama with joined projections on disk, RoPE on a part of each head, and longrope."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.layouts import GroupedQKV
from megadpo.families.reading import HfConfig
from megadpo.families.rope import read_rope
from megadpo.families.rows import ATTENTION, JOINED_MLP, Row
from megadpo.families.windows import with_windows

JOINED_QKV = Row("self_attention.linear_qkv.weight", GroupedQKV(), {"self_attn.qkv_proj.weight": ("qh", "kh", "kh")})


@FAMILIES.add("phi3")
class Phi3(Family):
    """Only longrope's factors for short sequences: pairs longer than original_max_position_embeddings are refused."""

    classes = ("Phi3ForCausalLM",)
    defaults = Family.defaults | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    }
    biases = ("attention_bias", "mlp_bias", "lm_head_bias")

    def read(self, config: HfConfig) -> Architecture:
        return with_windows(config, super().read(config), usual=lambda number: True)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        return read_rope(config, head_dim, length, partial=True, also={"su": "longrope", "yarn": "longrope"})

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        input_norm, _, output = ATTENTION
        return (input_norm, JOINED_QKV, output, *JOINED_MLP)
