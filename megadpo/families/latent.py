"""The base of families with multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): its keys in config.json, and its
weight rows."""

from __future__ import annotations

import math
from typing import ClassVar

from megadpo.config.architecture import Architecture, Experts, Latent, Mlp, Rotary, Router
from megadpo.families.experts import expert_rows, read_experts, shared_expert_rows
from megadpo.families.family import Family
from megadpo.families.layouts import Columns, Replicated, Rows
from megadpo.families.reading import HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import MLP, Row, norm_row

_ATTENTION = (
    norm_row("input_layernorm", "input_layernorm"),
    Row("self_attention.linear_kv_down_proj.weight", Replicated(), {"self_attn.kv_a_proj_with_mqa.weight": "th"}),
    norm_row("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", "c"),
    Row("self_attention.linear_kv_up_proj.weight", Rows(), {"self_attn.kv_b_proj.weight": "uc"}),
    Row("self_attention.linear_proj.weight", Columns(), {"self_attn.o_proj.weight": "ho"}),
)
_QUERIES = (Row("self_attention.linear_q_proj.weight", Rows(), {"self_attn.q_proj.weight": "qh"}),)
_QUERIES_OF_A_LATENT = (
    Row("self_attention.linear_q_down_proj.weight", Replicated(), {"self_attn.q_a_proj.weight": "rh"}),
    norm_row("self_attention.q_layernorm", "self_attn.q_a_layernorm", "r"),
    Row("self_attention.linear_q_up_proj.weight", Rows(), {"self_attn.q_b_proj.weight": "qr"}),
)


class LatentFamily(Family):
    """Base of these families: some dense layers, then layers with experts and a shared expert. The norms of latents always
    have an epsilon of 1e-6, as in transformers."""

    expert_rows: ClassVar[tuple[Row, ...]] = (*expert_rows(), *shared_expert_rows("mlp.shared_experts"))

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config)
        one, rank = arch.attention, config.get("q_lora_rank")
        if one.num_kv_heads != one.num_heads:
            config.report("num_key_value_heads", one.num_kv_heads, f"num_attention_heads {one.num_heads}")
        assert one.rotary is not None
        latent = Latent(
            q_rank=None if rank is None else config.size("q_lora_rank"),
            kv_rank=config.size("kv_lora_rank"),
            rope_dim=one.rotary.dims,
        )
        arch = arch.with_attention(
            value_dim=config.size("v_head_dim"), latent=latent, scale=one.scale * _scale_of_yarn(config)
        )
        shared = config.size("n_shared_experts") * config.size("moe_intermediate_size")
        experts = read_experts(
            config,
            count="n_routed_experts",
            router=self.router(config),
            shared_ffn_size=shared,
            shared_gate=False,
        )
        config.refuse(
            "moe_layer_freq", "1", "choose a model whose layers of experts are one after another", unless=(1,)
        )
        return self.with_experts(config, arch, experts)

    def router(self, config: HfConfig) -> Router:
        raise NotImplementedError

    def with_experts(self, config: HfConfig, arch: Architecture, experts: Experts) -> Architecture:
        dense = config.size("first_k_dense_replace", least=0)
        return arch.with_feed_forward(experts, only=range(dense, arch.num_layers))

    def head_dim(self, config: HfConfig, hidden: int, heads: int) -> int:
        return config.size("qk_nope_head_dim") + config.size("qk_rope_head_dim")

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        width, interleaved = config.get("qk_rope_head_dim"), bool(config.get("rope_interleave"))
        sound = isinstance(width, int) and 0 < width < head_dim  # else head_dim has reported it
        return read_rope(config, width if sound else 2, length, interleaved=interleaved)

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return (f"model.layers.{arch.num_layers}.*",)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        latent, mlp = arch.attention.latent, arch.layers[number].feed_forward
        assert latent is not None
        queries = _QUERIES if latent.q_rank is None else _QUERIES_OF_A_LATENT
        return (*_ATTENTION, *queries, *(MLP if isinstance(mlp, Mlp) else self.expert_rows))


def _scale_of_yarn(config: HfConfig) -> float:
    """(0.1 mscale_all_dim ln(factor) + 1)^2 for a scaled RoPE, else 1 (transformers' yarn_apply_mscale)."""
    _, given = given_rope(config)
    weight, factor = given.get("mscale_all_dim"), given.get("factor")
    scaled = given.get("rope_type", given.get("type", "default")) != "default"
    if (
        not scaled or not weight or not isinstance(factor, (int, float)) or factor <= 1
    ):  # read_rope has reported other types
        return 1.0
    return float(0.1 * weight * math.log(factor) + 1.0) ** 2
