"""Rows of weight tables, and those that many families share.

A row is one parameter of a megatron-core layer and the Hugging Face tensors in it. The axes of a tensor are letters:
h hidden, q query heads x head dim, k KV heads x head dim, d head dim, a query heads, f feed-forward, v vocabulary, n experts,
x feed-forward of an expert, s of the shared expert. Of latent attention: r the queries' latent, c that of keys and values,
t the same with the turned channels of keys, u query heads x (a key's other channels and a value's), o query heads x value's.
Of attention with an output gate: g query heads x (a query's channels and a gate's). Of a delta net: p key heads x a key's
channels, y value heads x a value's, b value heads, e a value's channels, w width of the convolution, i twice p and y, j twice b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megadpo.families.layouts import Columns, GatedMLP, GroupedQKV, Replicated, Rows, TensorLayout


@dataclass(frozen=True)
class Stack:
    """The one tensor [E, ...] in which a folder holds a row's tensors of all experts."""

    name: str
    interleaved: bool = False
    """The rows of an expert's tensors take turns; else they stand one tensor after another."""
    transposed: bool = False
    """Its last two axes are exchanged."""


@dataclass(frozen=True)
class Row:
    """One Megatron parameter, the Hugging Face tensors in it (name: axes), and how they lie in it. Several axes for one
    name are of several parts, which the tensor has one after another in its rows. In names, {e} is the number of an expert;
    rows of a layer leave the layer's prefix out."""

    megatron: str
    layout: TensorLayout
    hf: Mapping[str, str | tuple[str, ...]]
    fused: str = ""
    """Its other name: in Transformer Engine's spec, and in checkpoints, a norm belongs to the linear that follows."""
    grouped: str = ""
    """Rows of one expert: the name in Transformer Engine's grouped experts."""
    stacked: str = ""
    """Rows of one expert: the name in checkpoints, of all experts in one tensor."""
    hf_stacked: str = ""
    """Rows of one expert: the tensor [E, ...] of all experts that some folders hold instead, made of `hf`'s by rows."""
    stack: Stack | None = None
    """Rows of one expert: where folders hold `hf`'s tensors, whose names are then of no file."""
    also: Mapping[str, str] = field(default_factory=dict)
    """A tensor of `hf`: its name in some other folders."""
    frozen: bool = False
    """It is not trained, and stays in float32 whatever the model's dtype."""

    @property
    def is_expert(self) -> bool:
        return bool(self.stacked)


EMBEDDING = Row("embedding.word_embeddings.weight", Rows(), {"model.embed_tokens.weight": "vh"})
FINAL_NORM = Row("decoder.final_layernorm.weight", Replicated(), {"model.norm.weight": "h"})
HEAD = Row("output_layer.weight", Rows(), {"lm_head.weight": "vh"})


def norm_row(megatron: str, hf: str, axes: str = "h", fused: str = "") -> Row:
    """A norm's weight, by the two names of the norm."""
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
