"""One weight table per Hugging Face family: which tensors of the folder make which tensor of megatron-core.

Each table is read in both directions, and it also says which tensors a folder must hold and of which shape.
Axes: h hidden, q query heads x head dim, k KV heads x head dim, d head dim, f feed-forward, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megadpo.config.architecture import Architecture
from megadpo.model.weights.layouts import Columns, GatedMLP, GroupedQKV, Layout, Replicated, Rows, Shape, Sliceable


@dataclass(frozen=True)
class Row:
    """One Megatron parameter, the Hugging Face tensors in it (name: axes), and how they lie in it."""

    megatron: str
    layout: Layout
    hf: Mapping[str, str]
    fused: str = ""
    """Its other name: in Transformer Engine's spec, and in checkpoints, a norm belongs to the linear that follows."""


MEGATRON_LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."

_LAYER = (
    Row("input_layernorm.weight", Replicated(), {"input_layernorm.weight": "h"},
        fused="self_attention.linear_qkv.layer_norm_weight"),
    Row("self_attention.linear_qkv.weight", GroupedQKV(),
        {"self_attn.q_proj.weight": "qh", "self_attn.k_proj.weight": "kh", "self_attn.v_proj.weight": "kh"}),
    Row("self_attention.linear_proj.weight", Columns(), {"self_attn.o_proj.weight": "hq"}),
    Row("pre_mlp_layernorm.weight", Replicated(), {"post_attention_layernorm.weight": "h"},
        fused="mlp.linear_fc1.layer_norm_weight"),
    Row("mlp.linear_fc1.weight", GatedMLP(), {"mlp.gate_proj.weight": "fh", "mlp.up_proj.weight": "fh"}),
    Row("mlp.linear_fc2.weight", Columns(), {"mlp.down_proj.weight": "hf"}),
)  # fmt: skip
_QKV_BIAS = (
    Row("self_attention.linear_qkv.bias", GroupedQKV(),
        {"self_attn.q_proj.bias": "q", "self_attn.k_proj.bias": "k", "self_attn.v_proj.bias": "k"}),
)  # fmt: skip
_QK_NORM = (
    Row("self_attention.q_layernorm.weight", Replicated(), {"self_attn.q_norm.weight": "d"}),
    Row("self_attention.k_layernorm.weight", Replicated(), {"self_attn.k_norm.weight": "d"}),
)

FAMILIES: Mapping[str, tuple[Row, ...]] = {
    "llama": _LAYER,
    "mistral": _LAYER,
    "qwen2": _LAYER + _QKV_BIAS,
    "qwen3": _LAYER + _QK_NORM,
}
_EMBEDDING = Row("embedding.word_embeddings.weight", Rows(), {"model.embed_tokens.weight": "vh"})
_FINAL_NORM = Row("decoder.final_layernorm.weight", Replicated(), {"model.norm.weight": "h"})
_HEAD = Row("output_layer.weight", Rows(), {"lm_head.weight": "vh"})
# Tied embeddings: the last pipeline stage holds a copy of its own, which no checkpoint and no export has.
_TIED_HEAD = Row("output_layer.weight", Rows(), {"model.embed_tokens.weight": "vh"})


@dataclass(frozen=True)
class Entry:
    """A row for one layer of one architecture."""

    row: Row
    layer: int | None
    """Global, from 0; None outside the layers."""
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    groups: int
    """KV heads of the architecture."""

    @property
    def names(self) -> tuple[str, ...]:
        """Megatron's parameter names, with the global layer number."""
        prefix = "" if self.layer is None else MEGATRON_LAYER.format(i=self.layer)
        return tuple(prefix + name for name in (self.row.megatron, self.row.fused) if name)

    @property
    def extra_state_key(self) -> str | None:
        """Key of the (empty) `_extra_state` that megatron-core's linear layers keep beside their weight."""
        if self.layer is None or self.row.layout.sharded_dim is None or not self.checkpoint_key.endswith(".weight"):
            return None
        return self.checkpoint_key.removesuffix("weight") + "_extra_state"

    @property
    def checkpoint_key(self) -> str:
        """Of the tensor of all layers that checkpoints hold, whichever spec built the model."""
        return self.names[-1] if self.layer is None else stacked(self.names[-1], self.layer)

    @property
    def full_shape(self) -> Shape:
        """Shape of the whole Megatron tensor."""
        return self.row.layout.full_shape(self.shapes)

    def local_shape(self, tp_size: int) -> Shape:
        """Shape of one rank's shard."""
        return self.row.layout.local_shape(self.shapes, tp_size)

    def fill(self, shard: torch.Tensor, sources: Sequence[Sliceable], tp_rank: int = 0, tp_size: int = 1) -> None:
        """Copy this rank's part of `sources` (in the order of `hf`) into `shard`."""
        self.row.layout.fill(shard, sources, self.shapes, self.groups, tp_rank, tp_size)

    def to_hf(self, full: torch.Tensor) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors out of the whole Megatron tensor."""
        return dict(zip(self.hf, self.row.layout.to_hf(full, self.shapes, self.groups), strict=True))


def stacked(name: str, layer: int) -> str:
    """decoder.layers.3.mlp... -> decoder.layers.mlp..., megatron-core's key for all layers in one tensor."""
    return name.replace(MEGATRON_LAYER.format(i=layer), MEGATRON_LAYER.replace("{i}.", ""), 1)


@dataclass(frozen=True)
class WeightTable:
    """Every weight of one architecture, in the order of the forward pass."""

    entries: tuple[Entry, ...]
    num_layers: int
    by_name: Mapping[str, Entry] = field(repr=False)
    """Megatron name (either of the two) -> entry; the tied copy of the embedding included."""

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every tensor that the folder must hold."""
        return {name: shape for entry in self.entries for name, shape in zip(entry.hf, entry.shapes, strict=True)}


def weight_table(arch: Architecture) -> WeightTable:
    """The table of `arch.family`, written out for its layers and sizes."""
    entries = tuple(_expand(arch))
    by_name = {name: entry for entry in entries for name in entry.names}
    if arch.tie_word_embeddings:
        by_name[_TIED_HEAD.megatron] = _entry(arch, _TIED_HEAD, None)
    return WeightTable(entries, arch.num_layers, by_name)


def _expand(arch: Architecture) -> Iterator[Entry]:
    yield _entry(arch, _EMBEDDING, None)
    for layer in range(arch.num_layers):
        for row in FAMILIES[arch.family]:
            yield _entry(arch, row, layer)
    yield _entry(arch, _FINAL_NORM, None)
    if not arch.tie_word_embeddings:
        yield _entry(arch, _HEAD, None)


def _entry(arch: Architecture, row: Row, layer: int | None) -> Entry:
    sizes = {
        "h": arch.hidden_size,
        "q": arch.num_heads * arch.head_dim,
        "k": arch.num_kv_heads * arch.head_dim,
        "d": arch.head_dim,
        "f": arch.ffn_hidden_size,
        "v": arch.vocab_size,
    }
    prefix = "" if layer is None else HF_LAYER.format(i=layer)
    return Entry(
        row=row,
        layer=layer,
        hf=tuple(prefix + name for name in row.hf),
        shapes=tuple(tuple(sizes[axis] for axis in axes) for axes in row.hf.values()),
        groups=arch.num_kv_heads,
    )
