"""Rows of weight tables, and the rows that many families share.

A row is one parameter of a megatron-core layer and the Hugging Face tensors in it. Letters are the axes of a tensor:
h hidden, q query heads x head dim, k KV heads x head dim, d head dim, a query heads, f feed-forward, v vocabulary, n experts,
x feed-forward of an expert, s of the shared expert. For latent attention: r latent of queries, c latent of keys and values,
t c and the rotated channels of keys, u query heads x (other channels of a key + channels of a value), o query heads x
channels of a value.
For attention with an output gate: g query heads x (channels of a query + channels of its gate). For a delta net: p key heads x
channels of a key, y value heads x channels of a value, b value heads, e channels of a value, w width of the convolution,
i twice p and y, j twice b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megadpo.families.layouts import Columns, GatedMLP, GroupedQKV, Replicated, Rows, TensorLayout


@dataclass(frozen=True)
class Stack:
    """The tensor [E, ...] in which a folder has a row's tensors for all experts."""

    name: str
    interleaved: bool = False
    """The rows of an expert's tensors alternate. Else one tensor follows the other."""
    transposed: bool = False
    """The last two axes are exchanged."""


@dataclass(frozen=True)
class Row:
    """One Megatron parameter, the Hugging Face tensors in it (name: axes), and their layout. Several axes for one name mean
    several parts, one after the other in the tensor's rows. In names, {e} is the number of an expert. Names in a layer are
    without the layer's prefix."""

    megatron: str
    layout: TensorLayout
    hf: Mapping[str, str | tuple[str, ...]]
    fused: str = ""
    """Second name, for a norm: in Transformer Engine's spec and in checkpoints it is part of the next linear layer."""
    grouped: str = ""
    """For an expert: the name in Transformer Engine's grouped experts."""
    stacked: str = ""
    """For an expert: the name in checkpoints, of one tensor for all experts."""
    hf_stacked: str = ""
    """For an expert: the tensor [E, ...] that some folders have for all experts, with `hf`'s tensors as its rows."""
    stack: Stack | None = None
    """For an expert: the tensor that all folders have. Then `hf`'s names occur in no file."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Tensor of `hf` -> its name in some other folders."""
    frozen: bool = False
    """It is never trained, and is float32 for every dtype of the model."""

    @property
    def is_expert(self) -> bool:
        return bool(self.stacked)


EMBEDDING = Row("embedding.word_embeddings.weight", Rows(), {"model.embed_tokens.weight": "vh"})
FINAL_NORM = Row("decoder.final_layernorm.weight", Replicated(), {"model.norm.weight": "h"})
HEAD = Row("output_layer.weight", Rows(), {"lm_head.weight": "vh"})


def norm_row(megatron: str, hf: str, axes: str = "h", fused: str = "") -> Row:
    """The row of a norm's weight. megatron, hf: names of the norm."""
    return Row(f"{megatron}.weight", Replicated(), {f"{hf}.weight": axes}, fused=fused)


ATTENTION = (
    norm_row("input_layernorm", "input_layernorm", fused="self_attention.linear_qkv.layer_norm_weight"),
    Row("self_attention.linear_qkv.weight", GroupedQKV(),
        {"self_attn.q_proj.weight": "qh", "self_attn.k_proj.weight": "kh", "self_attn.v_proj.weight": "kh"}),
    Row("self_attention.linear_proj.weight", Columns(), {"self_attn.o_proj.weight": "hq"}),
)  # fmt: skip
QKV_BIAS = (
    Row("self_attention.linear_qkv.bias", GroupedQKV(),
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"}),
)  # fmt: skip
QK_NORM = (
    norm_row("self_attention.q_layernorm", "self_attn.q_norm", "d"),
    norm_row("self_attention.k_layernorm", "self_attn.k_norm", "d"),
)
QK_NORM_OF_ALL_HEADS = (
    norm_row("self_attention.core_attention.q_layernorm", "self_attn.q_norm", "q"),
    norm_row("self_attention.core_attention.k_layernorm", "self_attn.k_norm", "k"),
)
MLP = (
    norm_row("pre_mlp_layernorm", "post_attention_layernorm", fused="mlp.linear_fc1.layer_norm_weight"),
    Row("mlp.linear_fc1.weight", GatedMLP(), {"mlp.gate_proj.weight": "fh", "mlp.up_proj.weight": "fh"}),
    Row("mlp.linear_fc2.weight", Columns(), {"mlp.down_proj.weight": "hf"}),
)  # fmt: skip
JOINED_MLP = (
    MLP[0],
    Row("mlp.linear_fc1.weight", GatedMLP(), {"mlp.gate_up_proj.weight": ("fh", "fh")}),
    MLP[2],
)
