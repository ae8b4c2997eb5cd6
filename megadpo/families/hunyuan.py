"""Hunyuan's dense models: Llama with norms of queries and keys after RoPE, and a RoPE with a larger base."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import RESTORE, HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import Row, norm_row

QK_NORM_AFTER_ROPE = (
    norm_row("self_attention.core_attention.q_layernorm", "self_attn.query_layernorm", "d"),
    norm_row("self_attention.core_attention.k_layernorm", "self_attn.key_layernorm", "d"),
)
_UNUSED = {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


@FAMILIES.add("hunyuan_v1_dense")
class HunYuanDenseV1(Family):
    """With `alpha`, RoPE's base is enlarged, equally for all lengths (NTK)."""

    classes = ("HunYuanDenseV1ForCausalLM",)
    defaults = Family.defaults | {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("use_cla", "false: each layer has its own keys and values", "choose a model without it")
        config.refuse("use_qk_norm", "true", RESTORE, unless=(None, True))
        return super().read(config).with_attention(qk_norm="head_after_rope")

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        spelling, given = given_rope(config)
        if not given.get("alpha") or given.get("rope_type", given.get("type")) != "dynamic":
            return read_rope(config, head_dim, length)
        # then transformers reads none of the other numbers
        rope = {key: value for key, value in given.items() if key not in _UNUSED | {"alpha", "type", "rope_type"}}
        plain = read_rope(config, head_dim, length, rope=(spelling, rope))
        return Rotary(theta=plain.theta * given["alpha"] ** (head_dim / (head_dim - 2)), dims=plain.dims)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return super().layer(arch, number) + QK_NORM_AFTER_ROPE
