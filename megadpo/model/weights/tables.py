"""One weight table per Hugging Face family: which tensors of the folder make which tensor of megatron-core.

Each table is read in both directions, and it also says which tensors a folder must hold and of which shape.
Axes: h hidden, q query heads x head dim, k KV heads x head dim, d head dim, f feed-forward, v vocabulary, n experts,
x feed-forward of an expert, s of the shared expert.
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
    grouped: str = ""
    """Rows of one expert ({e} in names): the name in Transformer Engine's grouped experts."""
    stacked: str = ""
    """Rows of one expert: the name in checkpoints, of all experts in one tensor."""
    hf_stacked: str = ""
    """What folders hold instead whose experts are stacked: the tensor [E, ...] of all experts, made of `hf`'s by rows;
    for the router, its name there."""

    @property
    def is_expert(self) -> bool:
        return bool(self.stacked)


MEGATRON_LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."

_ATTENTION = (
    Row("input_layernorm.weight", Replicated(), {"input_layernorm.weight": "h"},
        fused="self_attention.linear_qkv.layer_norm_weight"),
    Row("self_attention.linear_qkv.weight", GroupedQKV(),
        {"self_attn.q_proj.weight": "qh", "self_attn.k_proj.weight": "kh", "self_attn.v_proj.weight": "kh"}),
    Row("self_attention.linear_proj.weight", Columns(), {"self_attn.o_proj.weight": "hq"}),
)  # fmt: skip
_LAYER = (
    *_ATTENTION,
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


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A layer of experts after its attention; the names are those of the block and of an expert's three projections."""
    expert, local, stack = f"{block}.experts.{{e}}.", "mlp.experts.local_experts.{e}.", "mlp.experts.experts."
    return (
        Row("pre_mlp_layernorm.weight", Replicated(), {"post_attention_layernorm.weight": "h"}),
        Row("mlp.router.weight", Replicated(), {f"{block}.gate.weight": "nh"}, hf_stacked="mlp.gate.weight"),
        Row(local + "linear_fc1.weight", GatedMLP(), {f"{expert}{gate}.weight": "xh", f"{expert}{up}.weight": "xh"},
            grouped="mlp.experts.linear_fc1.weight{e}", stacked=stack + "linear_fc1.weight",
            hf_stacked="mlp.experts.gate_up_proj"),
        Row(local + "linear_fc2.weight", Columns(), {f"{expert}{down}.weight": "hx"},
            grouped="mlp.experts.linear_fc2.weight{e}", stacked=stack + "linear_fc2.weight",
            hf_stacked="mlp.experts.down_proj"),
    )  # fmt: skip


_QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = (
    Row("mlp.shared_experts.linear_fc1.weight", GatedMLP(),
        {"mlp.shared_expert.gate_proj.weight": "sh", "mlp.shared_expert.up_proj.weight": "sh"}),
    Row("mlp.shared_experts.linear_fc2.weight", Columns(), {"mlp.shared_expert.down_proj.weight": "hs"}),
    Row("mlp.shared_experts.gate_weight", Replicated(), {"mlp.shared_expert_gate.weight": "1h"}),
)  # fmt: skip

FAMILIES: Mapping[str, tuple[Row, ...]] = {
    "llama": _LAYER,
    "mistral": _LAYER,
    "qwen2": _LAYER + _QKV_BIAS,
    "qwen3": _LAYER + _QK_NORM,
    "mixtral": _ATTENTION + _experts("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _ATTENTION + _QKV_BIAS + _QWEN_EXPERTS + _SHARED_EXPERT,
    "qwen3_moe": _ATTENTION + _QK_NORM + _QWEN_EXPERTS,
}
_EMBEDDING = Row("embedding.word_embeddings.weight", Rows(), {"model.embed_tokens.weight": "vh"})
_FINAL_NORM = Row("decoder.final_layernorm.weight", Replicated(), {"model.norm.weight": "h"})
_HEAD = Row("output_layer.weight", Rows(), {"lm_head.weight": "vh"})
# Tied embeddings: the last pipeline stage holds a copy of its own, which no checkpoint and no export has.
_TIED_HEAD = Row("output_layer.weight", Rows(), {"model.embed_tokens.weight": "vh"})


@dataclass(frozen=True)
class Entry:
    """A row for one layer (and one expert) of one architecture."""

    row: Row
    layer: int | None
    """Global, from 0; None outside the layers."""
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    groups: int
    """KV heads of the architecture."""
    expert: int | None = None
    """Global, from 0; None outside the experts."""
    hf_stacked: str = ""
    """Name of the tensor that folders with stacked experts hold instead of `hf`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Megatron's parameter names, with the global layer and expert numbers."""
        prefix = "" if self.layer is None else MEGATRON_LAYER.format(i=self.layer)
        names = (self.row.megatron, self.row.fused or self.row.grouped)
        return tuple(prefix + name.format(e=self.expert) for name in names if name)

    @property
    def index(self) -> tuple[int, ...]:
        """Its place in the leading dimensions of the tensor that checkpoints hold: layer, expert."""
        return tuple(number for number in (self.layer, self.expert) if number is not None)

    @property
    def extra_state_key(self) -> str | None:
        """Key of the (empty) `_extra_state` that megatron-core's linear layers keep beside their weight."""
        if self.layer is None or self.row.layout.sharded_dim is None or not self.checkpoint_key.endswith(".weight"):
            return None
        return self.checkpoint_key.removesuffix("weight") + "_extra_state"

    @property
    def checkpoint_key(self) -> str:
        """Of the tensor of all layers (and experts) that checkpoints hold, whichever spec built the model."""
        return self.checkpoint_keys[-1]

    @property
    def checkpoint_keys(self) -> tuple[str, ...]:
        """Every key that checkpoints may use, with the layer in the key first (`non_homogeneous_layers`)."""
        prefix = "" if self.layer is None else MEGATRON_LAYER.format(i=self.layer)
        names = (prefix + self.row.stacked,) if self.row.is_expert else self.names
        return names if self.layer is None else (*names, *(stacked(name, self.layer) for name in names))

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
    num_experts: int
    by_name: Mapping[str, Entry] = field(repr=False)
    """Megatron name (either of the two) -> entry; the tied copy of the embedding included."""

    def stack_shape(self, entry: Entry) -> Shape:
        """Sizes of the leading dimensions of the tensor that checkpoints hold of `entry`: layers, experts."""
        return (self.num_layers, self.num_experts)[: len(entry.index)]

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
    return WeightTable(entries, arch.num_layers, arch.moe.num_experts if arch.moe else 0, by_name)


def _expand(arch: Architecture) -> Iterator[Entry]:
    yield _entry(arch, _EMBEDDING, None)
    for layer in range(arch.num_layers):
        for row in _rows(arch):
            if row.is_expert:
                assert arch.moe is not None
                yield from (_entry(arch, row, layer, expert) for expert in range(arch.moe.num_experts))
            else:
                yield _entry(arch, row, layer)
    yield _entry(arch, _FINAL_NORM, None)
    if not arch.tie_word_embeddings:
        yield _entry(arch, _HEAD, None)


def _rows(arch: Architecture) -> Iterator[Row]:
    """Of a layer of `arch`: qwen2_moe can do without biases, by its config.json."""
    return (row for row in FAMILIES[arch.family] if arch.qkv_bias or row not in _QKV_BIAS)


def _entry(arch: Architecture, row: Row, layer: int | None, expert: int | None = None) -> Entry:
    sizes = {
        "h": arch.hidden_size,
        "q": arch.num_heads * arch.head_dim,
        "k": arch.num_kv_heads * arch.head_dim,
        "d": arch.head_dim,
        "f": arch.ffn_hidden_size,
        "v": arch.vocab_size,
        "1": 1,
    }
    if arch.moe is not None:
        sizes |= {"n": arch.moe.num_experts, "x": arch.moe.ffn_hidden_size, "s": arch.moe.shared_ffn_hidden_size or 0}
    prefix = "" if layer is None else HF_LAYER.format(i=layer)
    return Entry(
        row=row,
        layer=layer,
        hf=tuple(prefix + name.format(e=expert) for name in row.hf),
        shapes=tuple(tuple(sizes[axis] for axis in axes) for axes in row.hf.values()),
        groups=arch.num_kv_heads,
        expert=expert,
        hf_stacked=prefix + row.hf_stacked if row.hf_stacked else "",
    )
