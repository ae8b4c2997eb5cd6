"""Weight tables: which Hugging Face tensors make which megatron-core tensor, for every layer of one architecture.

A table is made from the family's rows (rows.py). It serves for reading and for writing, and has the tensors that a folder
must have, with their shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megadpo.config.architecture import Architecture, Attention, DeltaNet, Layer, Mlp
from megadpo.config.variants import FAMILIES
from megadpo.families.layouts import Rectangle, Shape
from megadpo.families.rows import Row

MEGATRON_LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."


@dataclass(frozen=True, kw_only=True)
class WeightEntry:
    """A row for one layer (and one expert) of one architecture."""

    row: Row
    layer: int | None
    """Global, from 0; None outside the layers."""
    expert: int | None
    """Global, from 0; None outside the experts."""
    hf: tuple[str, ...]
    parts: tuple[tuple[Shape, ...], ...]
    """For each tensor of `hf` the shapes of its parts; most have one part."""
    groups: int
    """Heads by which projections in one are cut: KV heads of attention, key heads of a delta net."""
    layer_in_key: bool
    """Whether checkpoints have a tensor for each layer, because layers differ; else one for all layers."""
    also: Mapping[str, str]
    """Tensor of `hf` -> its other name on disk."""
    hf_stacked: str
    """Name of the tensor of all experts that some folders have instead of `hf`; empty if there is none."""
    stack_name: str
    """Name of the tensor of all experts that every folder has instead of `hf`; empty if there is none."""

    @property
    def names(self) -> tuple[str, ...]:
        """Megatron's parameter names, with the global layer and expert numbers."""
        prefix = "" if self.layer is None else MEGATRON_LAYER.format(i=self.layer)
        names = (self.row.megatron, self.row.fused or self.row.grouped)
        return tuple(prefix + name.format(e=self.expert) for name in names if name)

    def index(self, key: str) -> tuple[int, ...]:
        """Its index in the leading dimensions (layer, expert) of the checkpoint's tensor `key`."""
        layer = None if key.startswith(MEGATRON_LAYER.format(i=self.layer)) else self.layer
        return tuple(number for number in (layer, self.expert) if number is not None)

    @property
    def extra_state_key(self) -> str | None:
        """Key of the empty `_extra_state` of a linear layer of megatron-core; None for other parameters."""
        if self.layer is None or self.row.layout.sharded_dim is None or not self.checkpoint_key.endswith(".weight"):
            return None
        return self.checkpoint_key.removesuffix("weight") + "_extra_state"

    @property
    def checkpoint_key(self) -> str:
        """Key of the checkpoint's tensor, which has all experts, and all layers or one. The same for every layer spec."""
        keys = self.checkpoint_keys
        return keys[len(keys) // 2 - 1 if self.layer_in_key and self.layer is not None else -1]

    @property
    def checkpoint_keys(self) -> tuple[str, ...]:
        """Every key that checkpoints may use, with the layer in the key first (`non_homogeneous_layers`)."""
        prefix = "" if self.layer is None else MEGATRON_LAYER.format(i=self.layer)
        names = (prefix + self.row.stacked,) if self.row.is_expert else self.names
        return names if self.layer is None else (*names, *(_all_layers(name, self.layer) for name in names))

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Of each tensor of `hf`."""
        return tuple((sum(part[0] for part in parts), *parts[0][1:]) for parts in self.parts)

    @property
    def full_shape(self) -> Shape:
        """Shape of the whole Megatron tensor."""
        return self.row.layout.full_shape(self.shapes)

    def local_shape(self, tp_size: int) -> Shape:
        """Shape of one rank's shard."""
        return self.row.layout.local_shape(self.shapes, tp_size)

    def rectangles(self, tp_rank: int = 0, tp_size: int = 1) -> list[Rectangle]:
        """The places of the Hugging Face tensors' parts in one rank's shard."""
        flat = [part for parts in self.parts for part in parts]
        found = self.row.layout.rectangles(flat, self.groups, tp_rank, tp_size)
        if len(flat) == len(self.hf):
            return found
        starts = [(n, start) for n, parts in enumerate(self.parts) for start in _starts(parts)]
        return [_in_tensor(rectangle, *starts[rectangle.source]) for rectangle in found]


def _starts(parts: tuple[Shape, ...]) -> Iterator[int]:
    """The first row of each part of a tensor."""
    return itertools.accumulate((part[0] for part in parts[:-1]), initial=0)


def _in_tensor(rectangle: Rectangle, source: int, first_row: int) -> Rectangle:
    """`rectangle` of a part as a rectangle of its tensor, in which the part begins at row `first_row`."""
    rows, *others = rectangle.source_index
    return Rectangle(source, (slice(rows.start + first_row, rows.stop + first_row), *others), rectangle.shard_index)


def _all_layers(name: str, layer: int) -> str:
    """decoder.layers.3.mlp... -> decoder.layers.mlp..., megatron-core's key for all layers in one tensor."""
    return name.replace(MEGATRON_LAYER.format(i=layer), MEGATRON_LAYER.replace("{i}.", ""), 1)


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """Every weight of one architecture, in the order of the forward pass."""

    entries: tuple[WeightEntry, ...]
    """The weights in the model's folder."""
    num_layers: int
    num_experts: int
    by_name: Mapping[str, WeightEntry] = field(repr=False)
    """Megatron name (either of the two) -> entry; the tied copy of the embedding included."""
    carried: tuple[str, ...]
    """Shell patterns of other tensors in the folder, which exports keep unchanged."""
    tied: tuple[str, str] | None
    """For tied embeddings: the Hugging Face names of embedding and head. A folder needs only the first."""

    def stack_shape(self, entry: WeightEntry) -> Shape:
        """Sizes of the leading dimensions (layers, experts) of the checkpoint's tensor of `entry`."""
        layers = () if entry.layer is None or entry.layer_in_key else (self.num_layers,)
        return layers if entry.expert is None else (*layers, self.num_experts)

    @property
    def stacks(self) -> dict[str, str]:
        """Tensor of one expert -> the tensor of all experts in which folders have it."""
        return {name: entry.stack_name for entry in self.entries if entry.stack_name for name in entry.hf}

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name -> shape of every tensor that the folder must have; those of `stacks` are inside others."""
        return {name: shape for entry in self.entries for name, shape in zip(entry.hf, entry.shapes, strict=True)}


def weight_table(arch: Architecture) -> WeightTable:
    """The table of `arch.family`, written out for its layers and sizes."""
    family = FAMILIES[arch.family]()
    sizes = {"h": arch.hidden_size, "v": arch.vocab_size, "1": 1}
    of_layer = functools.cache(lambda layer: sizes | _layer_sizes(layer))
    entries = [_entry(arch, family.embedding, sizes)]
    for number, layer in enumerate(arch.layers):
        for row in family.layer(arch, number):
            entries += _layer_entries(arch, row, number, of_layer(layer))
    entries.append(_entry(arch, family.final_norm, sizes))
    if not arch.tie_word_embeddings:
        entries.append(_entry(arch, family.head, sizes))
    in_no_folder = []
    tied = None
    if arch.tie_word_embeddings:
        tied = family.on_disk(next(iter(family.embedding.hf))), family.on_disk(next(iter(family.head.hf)))
        # The last pipeline stage holds a copy of the embedding, which no checkpoint and no export has.
        in_no_folder.append(_entry(arch, dataclasses.replace(family.head, hf=family.embedding.hf), sizes))
    return WeightTable(
        entries=tuple(entries),
        num_layers=arch.num_layers,
        num_experts=arch.experts.number if arch.experts else 0,
        by_name={name: entry for entry in (*entries, *in_no_folder) for name in entry.names},
        carried=family.carried(arch),
        tied=tied,
    )


def _layer_entries(arch: Architecture, row: Row, layer: int, sizes: Mapping[str, int]) -> Iterator[WeightEntry]:
    if not row.is_expert:
        yield _entry(arch, row, sizes, layer)
        return
    yield from (_entry(arch, row, sizes, layer, expert) for expert in range(sizes["n"]))


def _entry(
    arch: Architecture, row: Row, sizes: Mapping[str, int], layer: int | None = None, expert: int | None = None
) -> WeightEntry:
    family = FAMILIES[arch.family]()

    def on_disk(name: str) -> str:
        full: str = family.on_disk(name if layer is None else HF_LAYER.format(i=layer) + name.format(e=expert))
        return full

    return WeightEntry(
        row=row,
        layer=layer,
        expert=expert,
        hf=tuple(on_disk(name) for name in row.hf),
        parts=tuple(
            tuple(tuple(sizes[axis] for axis in part) for part in ((axes,) if isinstance(axes, str) else axes))
            for axes in row.hf.values()
        ),
        groups=_groups(arch.attention if layer is None else arch.layers[layer].attention),
        layer_in_key=arch.layers_differ,
        also={on_disk(name): on_disk(other) for name, other in row.also.items()},
        hf_stacked=on_disk(row.hf_stacked) if row.hf_stacked else "",
        stack_name=on_disk(row.stack.name) if row.stack else "",
    )


def _groups(attention: Attention | DeltaNet) -> int:
    return attention.key_heads if isinstance(attention, DeltaNet) else attention.num_kv_heads


def _layer_sizes(layer: Layer) -> dict[str, int]:
    """The axes of a layer that rows.py names."""
    attention, feed_forward = layer.attention, layer.feed_forward
    sizes = _delta_net_sizes(attention) if isinstance(attention, DeltaNet) else _attention_sizes(attention)
    if isinstance(feed_forward, Mlp):
        return sizes | {"f": feed_forward.ffn_size}
    shared = feed_forward.shared_ffn_size or 0
    return sizes | {"n": feed_forward.number, "x": feed_forward.mlp.ffn_size, "s": shared}


def _delta_net_sizes(one: DeltaNet) -> dict[str, int]:
    keys, values = one.key_heads * one.key_dim, one.value_heads * one.value_dim
    sizes = {"p": keys, "y": values, "b": one.value_heads, "e": one.value_dim, "w": one.conv_width}
    return sizes | {"i": 2 * (keys + values), "j": 2 * one.value_heads}


def _attention_sizes(attention: Attention) -> dict[str, int]:
    sizes = {
        "q": attention.num_heads * attention.head_dim,
        "k": attention.num_kv_heads * attention.head_dim,
        "d": attention.head_dim,
        "a": attention.num_heads,
        "g": attention.query_heads * attention.head_dim,
    }
    if attention.latent is not None:
        latent, plain = attention.latent, attention.head_dim - attention.latent.rope_dim
        sizes |= {
            "r": latent.q_rank or 0,
            "c": latent.kv_rank,
            "t": latent.kv_rank + latent.rope_dim,
            "u": attention.num_heads * (plain + attention.value_dim),
            "o": attention.num_heads * attention.value_dim,
        }
    return sizes
