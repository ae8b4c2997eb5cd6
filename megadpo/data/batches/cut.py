"""Cuts a pack for context parallelism. Every rank gets the same number of tokens and about the same attention work.

The run is cut into blocks, and each block is given to a rank. Keys are gathered before attention, so every assignment gives
exact results, and only balance matters. In causal attention, late tokens see more keys than early ones, and tokens of
long sequences more than those of short ones. Work is counted in query-key pairs, as in data/batches/work.py.

Blocks are as large as balance allows. Each border cuts a sequence, and a cut sequence costs one more kernel call and one
more copy of the keys before it. So the number of blocks for each rank is first 1 (enough for many short pairs), then 2
(for one long sequence this is ring attention's zigzag: the first block with the last), then 4, 8, ...
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from megadpo.data.batches.pack import ContextPart, PackedBatch, Segment

Ints = npt.NDArray[np.int64]

CONTEXT_BALANCE = 1.1
"""Limit on a rank's work / mean work. It is exceeded only if even blocks of one token can't keep it."""


@dataclass(frozen=True, eq=False)
class Cut:
    """Which rank holds which tokens of a run. B intervals cover its T tokens."""

    borders: list[int]
    """[B + 1] ascending, from 0 to T. Neighbouring intervals are on different ranks."""
    owners: list[int]
    """[B] the rank of each interval."""
    gathered: list[int]
    """[B] the start of each interval in gathered order: all tokens of rank 0, then of rank 1, ..."""
    work: Ints
    """[ranks] query-key pairs of each rank."""

    @property
    def imbalance(self) -> float:
        """Most work of a rank / mean work."""
        return float(self.work.max() / self.work.mean())

    def held_by(self, rank: int) -> list[tuple[int, int]]:
        """The ranges of the run that `rank` holds, in order."""
        return [piece for piece, owner in zip(pairwise(self.borders), self.owners, strict=True) if owner == rank]

    def as_gathered(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The tokens [start, end) of the run as ranges in gathered order. The ranges come in the run's order."""
        number = bisect_right(self.borders, start) - 1
        while start < end:
            stop = min(end, self.borders[number + 1])
            shift = self.gathered[number] - self.borders[number]
            yield start + shift, stop + shift
            start, number = stop, number + 1


def context_part(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """The part of `batch` that context-parallel rank `rank` of `size` holds. Every rank computes the same cut.

    Raises ValueError if `size` does not divide its tokens, or if `batch` is a part already.
    """
    if batch.part is not None:
        raise ValueError("the batch is a part already")
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size}")
    if size == 1:
        return batch
    total = batch.tokens.numel()
    cut = cut_run(batch.segments, size)
    held = cut.held_by(rank)
    run_index = np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in held])
    here = np.full(total, -1, dtype=np.int64)  # for each token of the run: its place in this part, or -1
    here[run_index] = np.arange(len(run_index))
    place = here[batch.predict_index.numpy()]
    mine = place >= 0
    segment_of = np.repeat(np.arange(len(batch.segments)), batch.segment_targets.numpy())
    predicted = np.bincount(segment_of[mine], minlength=len(batch.segments)).astype(np.int64, copy=False)
    index = torch.from_numpy(run_index)
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[index],
        positions=batch.positions[index],
        segments=tuple(_local_segments(batch.segments, held, cut)),
        predict_index=torch.from_numpy(place[mine]),
        targets=torch.from_numpy(batch.targets.numpy()[mine]),
        segment_targets=torch.from_numpy(predicted),
        token_weights=None if batch.token_weights is None else batch.token_weights[torch.from_numpy(mine)],
        part=ContextPart(
            run_index=index,
            run_segments=batch.segments,
            run_tokens=total,
            most_work=int(cut.work.max()),
            mean_work=float(cut.work.mean()),
        ),
        made={},
    )


def _local_segments(segments: Sequence[Segment], held: list[tuple[int, int]], cut: Cut) -> Iterator[Segment]:
    """The part of each segment in the ranges `held`. Queries that end n tokens before the segment's end see all keys of
    the segment except the last n."""
    ends = [segment.query_end for segment in segments]
    offset = 0  # tokens of this part before the held range
    for start, end in held:
        number = bisect_right(ends, start)
        while number < len(segments) and segments[number].query_start < end:
            segment = segments[number]
            first, last = max(start, segment.query_start), min(end, segment.query_end)
            keys = _first_keys(segment, segment.key_tokens - (segment.query_end - last), cut)
            yield Segment(offset + first - start, offset + last - start, keys)
            number += 1
        offset += end - start


def _first_keys(segment: Segment, count: int, cut: Cut) -> tuple[tuple[int, int], ...]:
    """The first `count` keys of `segment` as ranges in gathered order, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for start, end in segment.keys:
        for a, b in cut.as_gathered(start, min(end, start + count)):
            if ranges and ranges[-1][1] == a:
                ranges[-1] = (ranges[-1][0], b)
            else:
                ranges.append((a, b))
        count = max(0, count - (end - start))
    return tuple(ranges)


def cut_run(segments: Sequence[Segment], size: int) -> Cut:
    """The cut over `size` ranks with the fewest blocks that keeps CONTEXT_BALANCE; else the cut with the best balance.

    Deterministic. Raises ValueError if `size` does not divide the run's tokens.
    """
    total = segments[-1].query_end
    if total % size:
        raise ValueError(f"a run of {total} tokens is not a multiple of the {size} context-parallel ranks")
    work_before = _work_before(segments)
    best: Cut | None = None
    blocks = size
    while True:
        blocks = min(blocks, total)
        cut = _cut_in(blocks, total, size, work_before)
        if best is None or cut.imbalance < best.imbalance:
            best = cut
        if best.imbalance <= CONTEXT_BALANCE or blocks == total:
            return best
        blocks *= 2


def _work_before(segments: Sequence[Segment]) -> Ints:
    """[T + 1]: query-key pairs of the tokens before each token of the run."""
    seen = [np.arange(s.key_tokens - s.query_tokens, s.key_tokens, dtype=np.int64) + 1 for s in segments]
    return np.concatenate([[0], np.cumsum(np.concatenate(seen))])


def _cut_in(blocks: int, total: int, size: int, work_before: Ints) -> Cut:
    """A cut into `blocks` blocks. Their lengths differ by at most one token; every rank gets the same number of both
    lengths."""
    length, longer = divmod(total, blocks)
    # size divides total and blocks, so it also divides `longer`
    lengths = np.full(blocks, length, dtype=np.int64)
    lengths[:longer] += 1
    borders = np.concatenate([[0], np.cumsum(lengths)])
    work = np.diff(work_before[borders])
    owners = _deal(work, longer, size)
    joined = np.flatnonzero(np.diff(owners)) + 1  # borders between blocks on different ranks
    inner = borders[joined].tolist()
    interval_owners = owners[np.concatenate([[0], joined])].tolist()
    edges = [0, *inner, total]
    filled = [rank * (total // size) for rank in range(size)]
    gathered = []
    for (start, end), owner in zip(pairwise(edges), interval_owners, strict=True):
        gathered.append(filled[owner])
        filled[owner] += end - start
    return Cut(edges, interval_owners, gathered, np.bincount(owners, weights=work, minlength=size).astype(np.int64))


def _deal(work: Ints, longer: int, size: int) -> Ints:
    """[B] the rank of each block. Every rank gets the same number of the first `longer` blocks, and of the others.

    The block with the most work comes first; each goes to the rank with the least work that may still get one (LPT).
    """
    owners = np.empty(len(work), dtype=np.int64)
    loads = [0] * size
    kind = [0 if block < longer else 1 for block in range(len(work))]
    room = [[longer // size] * size, [(len(work) - longer) // size] * size]
    costs = work.tolist()
    for block in sorted(range(len(work)), key=lambda block: (-costs[block], block)):
        rooms = room[kind[block]]
        rank = min((r for r in range(size) if rooms[r]), key=lambda r: (loads[r], r))
        owners[block] = rank
        rooms[rank] -= 1
        loads[rank] += costs[block]
    return owners
