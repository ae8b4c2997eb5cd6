"""Layouts: how Hugging Face tensors are placed in one tensor of megatron-core, or in one rank's shard of it.

A layout lists rectangles of the Hugging Face tensors, and the place of each in the Megatron shard. Reading and writing copy
the same rectangles (model/weights/load.py), so an export gives back what was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Shape = tuple[int, ...]


class Rectangle(NamedTuple):
    """`shard[shard_index]` is `sources[source][source_index]`."""

    source: int
    source_index: tuple[slice, ...]
    shard_index: tuple[slice | None, ...]


class TensorLayout:
    """Base of the layouts: sources stacked along dim 0, in order, and split over tp ranks along `sharded_dim`."""

    sharded_dim: int | None = None

    def full_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the whole Megatron tensor that holds sources of these shapes."""
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def local_shape(self, shapes: Sequence[Shape], tp_size: int) -> Shape:
        """Shape of one rank's shard. Raises ValueError if the ranks don't divide it."""
        shape = self.full_shape(shapes)
        if self.sharded_dim is None:
            return shape
        rows = _share(shape[self.sharded_dim], 0, tp_size)
        return (*shape[: self.sharded_dim], rows.stop, *shape[self.sharded_dim + 1 :])

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        """Every rectangle of the shard of `tp_rank`, in rising order within each source. `groups`: KV or key heads."""
        raise NotImplementedError


class Replicated(TensorLayout):
    """The same on every rank: norms."""

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        return [Rectangle(0, (slice(None),), (slice(None),))]


class OneRow(TensorLayout):
    """The same on every rank; on disk it is a matrix [1, n]."""

    def full_shape(self, shapes: Sequence[Shape]) -> Shape:
        return shapes[0][1:]

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        return [Rectangle(0, (slice(None),), (None,))]


class Rows(TensorLayout):
    """Column-parallel weights and embeddings: rank r holds the r-th block of rows."""

    sharded_dim = 0

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        return [Rectangle(0, (_share(shapes[0][0], tp_rank, tp_size),), (slice(None),))]


class Columns(TensorLayout):
    """Row-parallel weights: rank r holds the r-th block of columns."""

    sharded_dim = 1

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        return [Rectangle(0, (slice(None), _share(shapes[0][1], tp_rank, tp_size)), (slice(None), slice(None)))]


class GatedMLP(TensorLayout):
    """Gate and up projection in one: rank r holds [gate block r; up block r]."""

    sharded_dim = 0

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        rectangles = []
        for source, shape in enumerate(shapes):
            block = _share(shape[0], tp_rank, tp_size)
            rows = block.stop - block.start
            rectangles.append(Rectangle(source, (block,), (slice(source * rows, (source + 1) * rows),)))
        return rectangles


class GroupedQKV(TensorLayout):
    """Query, key and value projection in one, KV group by KV group: [queries of group 0, key 0, value 0, queries of group 1,
    ...]. Other sources likewise: each group has an equal part of each. Rank r has the r-th block of groups."""

    sharded_dim = 0

    def rectangles(self, shapes: Sequence[Shape], groups: int, tp_rank: int, tp_size: int) -> list[Rectangle]:
        mine = _share(groups, tp_rank, tp_size)
        rectangles, start = ([], 0)
        for group in range(mine.start, mine.stop):
            for source, shape in enumerate(shapes):
                rows = _share(shape[0], group, groups)
                stop = start + rows.stop - rows.start
                rectangles.append(Rectangle(source, (rows,), (slice(start, stop),)))
                start = stop
        return rectangles


def _share(size: int, rank: int, parts: int) -> slice:
    """Rank's block of `size` rows cut into equal `parts`."""
    if size % parts:
        raise ValueError(f"{size} rows cannot be cut into {parts} equal blocks")
    rows = size // parts
    return slice(rank * rows, (rank + 1) * rows)
