"""What families with gated delta nets share (arXiv 2412.06464): which layers have them, what config.json says of them, and
which tensors they have."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from megadpo.config.architecture import Architecture, Attention, DeltaNet, Rotary
from megadpo.families.family import Family
from megadpo.families.layouts import Columns, GroupedQKV, Replicated, Rows
from megadpo.families.reading import HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import ATTENTION, MLP, QK_NORM, Row, norm_row

_OF_TEXTS = ("mrope_section", "mrope_interleaved")
"""How channels are shared out among time, height and width, which are one number for texts."""


class DeltaNetFamily(Family):
    """Base of these families: norms times 1 + weight (but for the delta net's own), norms of heads, and a gate on each
    head's output in the layers that have attention: every fourth, or those that `layer_types` says."""

    defaults: ClassVar[dict[str, Any]] = Family.defaults | {
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }
    layer_types = ("full_attention", "linear_attention")
    in_proj: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "linear_attn.in_proj_qkv.weight": ("ph", "ph", "yh"),
        "linear_attn.in_proj_z.weight": "yh",
        "linear_attn.in_proj_b.weight": "bh",
        "linear_attn.in_proj_a.weight": "bh",
    }
    """The tensors that a delta net's first projection is on disk."""
    feed_forward: ClassVar[tuple[Row, ...]] = MLP

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config).with_attention(qk_norm="head", output_gate=True)
        arch = dataclasses.replace(arch, norms=dataclasses.replace(arch.norms, zero_centred=True))
        keys, values = config.size("linear_num_key_heads"), config.size("linear_num_value_heads")
        if values % keys:
            config.report("linear_num_value_heads", values, f"a multiple of linear_num_key_heads {keys}")
        delta_net = DeltaNet(
            key_heads=keys,
            value_heads=values,
            key_dim=config.size("linear_key_head_dim"),
            value_dim=config.size("linear_value_head_dim"),
            conv_width=config.size("linear_conv_kernel_dim"),
        )
        having = self._linear(config, arch.num_layers)
        if len(having) == arch.num_layers:
            config.report("layer_types", "linear_attention alone", "full_attention in one layer at least")
            return arch
        return arch.with_delta_net(delta_net, only=having)

    def _linear(self, config: HfConfig, layers: int) -> list[int]:
        """The numbers of the layers that have a delta net, from 0."""
        types = config.get("layer_types")
        if types is None:
            every = config.size("full_attention_interval")
            return [number for number in range(layers) if (number + 1) % every]
        if not isinstance(types, list) or len(types) != layers:
            config.report("layer_types", types, f"a name for each of the {layers} layers")
            return []
        return [number for number, kind in enumerate(types) if kind == "linear_attention"]

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        spelling, given = given_rope(config)
        rope = {key: value for key, value in given.items() if key not in _OF_TEXTS}
        return read_rope(config, head_dim, length, rope=(spelling, rope), partial=True)

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return ("mtp.*",)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        if isinstance(arch.layers[number].attention, Attention):
            return _GATED_ATTENTION + self.feed_forward
        norm = norm_row("input_layernorm", "input_layernorm", fused="self_attention.linear_in_proj.layer_norm_weight")
        projection = Row("self_attention.linear_in_proj.weight", GroupedQKV(), self.in_proj)
        return (norm, projection, *_DELTA_NET, *self.feed_forward)


_GATED_ATTENTION = (
    ATTENTION[0],
    Row("self_attention.linear_qkv.weight", GroupedQKV(),
        {"self_attn.q_proj.weight": "gh", "self_attn.k_proj.weight": "kh", "self_attn.v_proj.weight": "kh"}),
    *ATTENTION[2:],
    *QK_NORM,
)  # fmt: skip
_DELTA_NET = (
    Row("self_attention.conv_weight", GroupedQKV(), {"linear_attn.conv1d.weight": ("p1w", "p1w", "y1w")}),
    Row("self_attention.A_log", Rows(), {"linear_attn.A_log": "b"}),
    Row("self_attention.dt_bias", Rows(), {"linear_attn.dt_bias": "b"}),
    Row("self_attention.norm_weight", Replicated(), {"linear_attn.norm.weight": "e"}),
    Row("self_attention.linear_proj.weight", Columns(), {"linear_attn.out_proj.weight": "hy"}),
)
