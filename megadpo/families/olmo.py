"""OLMo 2 and 3: norms after attention and MLP, not before, and norms over all heads of queries and of keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from megadpo.config.architecture import Architecture, Norms, Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import ATTENTION, MLP, QK_NORM_OF_ALL_HEADS, Row, norm_row
from megadpo.families.windows import having_windows, with_windows


@FAMILIES.add("olmo2")
class Olmo2(Family):
    """Grouped-query attention only if config.json says so."""

    classes = ("Olmo2ForCausalLM",)
    defaults = Family.defaults | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config).with_attention(qk_norm="width")
        return dataclasses.replace(arch, norms=Norms(eps=arch.norms.eps, placement="post"))

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        after = (
            norm_row("self_attn_bda.norm", "post_attention_layernorm"),
            norm_row("mlp_bda.norm", "post_feedforward_layernorm"),
        )
        return (*ATTENTION[1:], *QK_NORM_OF_ALL_HEADS, *MLP[1:], *after)


@FAMILIES.add("olmo3")
class Olmo3(Olmo2):
    """Windows in three of four layers. Only the others have a scaled RoPE."""

    classes = ("Olmo3ForCausalLM",)
    defaults = Olmo2.defaults | {"sliding_window": 4096, "rope_theta": 5e5}

    def read(self, config: HfConfig) -> Architecture:
        arch = with_windows(config, super().read(config), usual=lambda number: (number + 1) % 4 != 0)
        rotary = self._of_kind(config, "sliding_attention", arch.attention.head_dim, arch.max_position_embeddings)
        return arch.with_attention(only=having_windows(arch), rotary=rotary)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        return self._of_kind(config, "full_attention", head_dim, length)

    def _of_kind(self, config: HfConfig, kind: str, head_dim: int, length: int) -> Rotary:
        """The RoPE of layers of this kind. In transformers 4's form rope_scaling and rope_theta are for full attention. Sliding
        attention always has a theta of 500000, because transformers 5 has removed rope_theta from the config by then."""
        spelling, given = given_rope(config)
        nested = {"full_attention", "sliding_attention"} & given.keys()
        if nested:
            of_kind = given.get(kind) or {}
            rope: Mapping[str, Any] = {"rope_theta": 5e5, **of_kind}
            if "truncate" in of_kind:  # transformers doesn't read it here
                rope = {key: value for key, value in rope.items() if key != "truncate"}
            return read_rope(config, head_dim, length, rope=(f"{spelling}.{kind}", rope))
        if kind == "full_attention":
            return read_rope(config, head_dim, length)
        return Rotary(theta=5e5, dims=head_dim)
