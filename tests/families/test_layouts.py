"""The layouts by themselves, against reshapes written out here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megadpo.families.layouts import Columns, GatedMLP, GroupedQKV, OneRow, Replicated, Rows
from megadpo.families.rows import Row
from megadpo.families.weight_table import WeightEntry
from megadpo.model.weights.load import load_shard, to_hf

LAYOUTS = {
    "replicated": (Replicated(), [(5,)]),
    "one row": (OneRow(), [(1, 5)]),
    "rows": (Rows(), [(8, 3)]),
    "columns": (Columns(), [(3, 8)]),
    "gated": (GatedMLP(), [(8, 3), (8, 3)]),
    "qkv": (GroupedQKV(), [(24, 3), (8, 3), (8, 3)]),
    "qkv bias": (GroupedQKV(), [(24,), (8,), (8,)]),
}


def entry_of(layout, shapes, groups):
    names = [f"part{n}" for n in range(len(shapes))]
    row = Row("whole", layout, dict.fromkeys(names, ""))
    return WeightEntry(
        row=row,
        layer=None,
        expert=None,
        hf=tuple(names),
        parts=tuple((s,) for s in shapes),
        groups=groups,
        also={},
        hf_stacked="",
        stack_name="",
        layer_in_key=False,
    )


def counting(shapes):
    """Every number once, so that no two places can be mixed up."""
    start = 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        yield torch.arange(start, start + size).view(shape)
        start += size


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_hold_every_number_once_and_go_back(name, tp_size):
    layout, shapes = LAYOUTS[name]
    entry = entry_of(layout, shapes, 8)
    sources = list(counting(shapes))
    shards = [torch.full(entry.local_shape(tp_size), -1) for _ in range(tp_size)]
    for rank, shard in enumerate(shards):
        load_shard(shard, entry, sources, rank, tp_size)
    everything = shards[0] if layout.sharded_dim is None else torch.cat(shards)
    assert everything.flatten().sort().values.equal(torch.arange(everything.numel()))
    if tp_size == 1:
        for got, want in zip(to_hf(entry, shards[0]).values(), sources, strict=True):
            assert got.equal(want)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["gated", "qkv", "qkv bias"])
def test_parts_of_one_tensor_are_those_tensors(name, tp_size):
    """gate_up_proj, qkv_proj: what is stored apart elsewhere stands in the rows of one tensor."""
    layout, shapes = LAYOUTS[name]
    apart, sources = entry_of(layout, shapes, 4), list(counting(shapes))
    joined = dataclasses.replace(apart, hf=("joined",), parts=(tuple(shapes),))
    assert joined.shapes == ((sum(shape[0] for shape in shapes), *shapes[0][1:]),)
    assert joined.full_shape == apart.full_shape and joined.local_shape(tp_size) == apart.local_shape(tp_size)
    for rank in range(tp_size):
        shards = [torch.full(apart.local_shape(tp_size), -1) for _ in range(2)]
        load_shard(shards[0], apart, sources, rank, tp_size)
        load_shard(shards[1], joined, [torch.cat(sources)], rank, tp_size)
        assert shards[0].equal(shards[1])
    if tp_size == 1:
        assert to_hf(joined, shards[1])["joined"].equal(torch.cat(sources))


def test_qkv_goes_group_by_group():
    shapes = [(6, 1), (3, 1), (3, 1)]  # 3 groups of 2 query rows
    whole = torch.empty(12, 1, dtype=torch.int64)
    load_shard(whole, entry_of(GroupedQKV(), shapes, 3), list(counting(shapes)))
    assert whole.flatten().tolist() == [0, 1, 6, 9, 2, 3, 7, 10, 4, 5, 8, 11]


def test_gate_and_up_blocks_of_each_rank():
    shapes = [(4,), (4,)]
    shard = torch.empty(4, dtype=torch.int64)
    load_shard(shard, entry_of(GatedMLP(), shapes, 1), list(counting(shapes)), 1, 2)
    assert shard.tolist() == [2, 3, 6, 7]


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="9 rows cannot be cut into 2 equal blocks"):
        Rows().local_shape([(9, 2)], 2)
