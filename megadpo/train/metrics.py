"""Sums and counts of metrics over micro-batches and ranks. They are reduced once and divided once."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


class MetricSums:
    """Collects `name -> (sum, count)`; the result is `name -> total sum / total count`.

    A mean of micro-batch means is wrong if the micro-batches have different numbers of pairs; the total sum over the total
    count is exact for every split. Sums are fp64 scalars on the device. Only `means` waits for the device, once.

        sums = MetricSums(device)
        for micro_batch in ...:
            sums.add(output.metrics)
        sums.reduce(lambda packed: torch.distributed.all_reduce(packed, group=data_parallel_group))
        sums.means()
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sums: dict[str, Tensor] = {}
        # A count may be a Python number. It stays on the host until `pack`, which saves a small copy for each metric
        self._counts: dict[str, Tensor | float] = {}
        self._checksum = 0.0
        self._checks: Tensor | None = None
        """[2] after `reduce`: the sum of all ranks' checksums, and how many ranks there are."""

    def add(self, values: Mapping[str, tuple[Tensor | float, Tensor | float]]) -> None:
        """Add scalar sums and counts of one micro-batch. No host synchronisation."""
        for name, (total, count) in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + self._scalar(total)
            if isinstance(count, Tensor):
                count = self._scalar(count)
            self._counts[name] = self._counts.get(name, 0.0) + count

    def names(self) -> list[str]:
        """The names collected so far, sorted: the order of `pack`."""
        return sorted(self._sums)

    def pack(self, names: Sequence[str] | None = None) -> Tensor:
        """fp64 [2N]: the N sums, then the N counts, sorted by name.

        names: pack exactly these; names that were not collected (on a pipeline stage without the loss) have sum and count
        zero. Raises ValueError if a collected name is not among them.
        """
        names = self.names() if names is None else sorted(names)
        unknown = set(self._sums) - set(names)
        if unknown:
            raise ValueError(f"collected {sorted(unknown)}, which are not among the names to pack {names}")
        values = [self._sums.get(name, 0.0) for name in names] + [self._counts.get(name, 0.0) for name in names]
        if not values:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.stack([self._scalar(value) for value in values])

    def reduce(self, all_reduce: Callable[[Tensor], object], names: Sequence[str] | None = None) -> None:
        """Replaces sums and counts by their totals over the ranks of a group, in one all-reduce.

        all_reduce: sums an fp64 tensor in place over the group; it is called once. Every rank of the group must have
            collected the same names, or pass the same `names`.

        The tensor also has a checksum of the names and a 1, which `means` reads: if a rank has other names, a loss would be
        added to an accuracy.
        """
        names = self.names() if names is None else sorted(names)
        self._checksum = float(zlib.crc32("\n".join(names).encode()))
        packed = torch.cat([self.pack(names), torch.stack([self._scalar(self._checksum), self._scalar(1.0)])])
        all_reduce(packed)
        self._checks = packed[-2:]
        self._sums = {name: packed[i] for i, name in enumerate(names)}
        self._counts = {name: packed[len(names) + i] for i, name in enumerate(names)}

    def means(self) -> dict[str, float]:
        """name -> sum / count, sorted by name; nan if the count is 0. One copy from the device. Raises RuntimeError if the
        ranks that `reduce` added up had collected different metrics."""
        names, packed = self.names(), self.pack()
        values = (packed if self._checks is None else torch.cat([packed, self._checks])).tolist()
        if self._checks is not None:
            # The checksums are integers below 2^32, so their sum over up to 2^21 ranks is exact in fp64
            *values, checksum_sum, ranks = values
            if checksum_sum != self._checksum * ranks:
                raise RuntimeError(f"the ranks of the group collected different metrics; this one has {names}")
        pairs = zip(values[: len(names)], values[len(names) :], strict=True)
        return {name: total / count if count else math.nan for name, (total, count) in zip(names, pairs, strict=True)}

    def _scalar(self, value: Tensor | float) -> Tensor:
        """fp64 scalar on the device. A Python number is written by a kernel, without a copy."""
        if not isinstance(value, Tensor):
            return torch.full((), float(value), dtype=torch.float64, device=self._device)
        if value.dim() != 0:
            raise ValueError(f"a sum or count must be a scalar; got shape {tuple(value.shape)}")
        return value.detach().to(device=self._device, dtype=torch.float64)
