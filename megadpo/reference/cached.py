"""The reference's log-probabilities of a data set, computed once and saved in a file.

Pairs are computed in the same order and packs as in the first epoch of training. So in the same layout the first epoch
has bit for bit the numbers of a resident reference. In another layout, in later epochs, or with a file from another run,
the numbers differ by rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.batches.pack import PackedBatch
from megadpo.files.atomic import move_aside, write_then_rename
from megadpo.parallel import ParallelContext
from megadpo.reference.resident import ResidentReference

Table = npt.NDArray[np.float32]
"""[answers]: logps in nats, by the number of the answer in the data set (`loader.answers`). NaN: not computed yet."""

SAVE_EVERY_BATCHES = 20
"""Global batches between two writes of the file. An interruption loses at most this much."""


@dataclass(frozen=True)
class LogpsCache:
    """The file for one data set and one reference, with a checksum: a flipped bit would be a wrong loss in every run that
    reads it. Only rank 0 reads and writes it."""

    path: Path

    def read(self, num_answers: int) -> Table:
        """[num_answers], NaN for answers that are not in the file. A damaged file counts as absent: it is renamed, and a
        line on stderr says so. Raises ConfigError if it can't be read or renamed."""
        try:
            if self.path.exists():
                try:
                    return self._verified(num_answers)
                except (SafetensorError, ValueError, KeyError, TypeError) as error:
                    aside, reason = move_aside(self.path), first_line(error)
                words = f"damaged ({reason}); it is now {aside.name}, and its numbers are computed again"
                print(f"{self.path}: {words}", file=sys.stderr, flush=True)
        except OSError as error:
            expected = "a file that can be read, or renamed if it is damaged"
            fix = "delete the file; it will be computed again"
            raise ConfigError(Problem(str(self.path), str(error), expected, fix)) from error
        return np.full(num_answers, np.nan, dtype=np.float32)

    def _verified(self, num_answers: int) -> Table:
        """Raises ValueError or safetensors' errors for another content than was written, and OSError."""
        with safe_open(self.path, "numpy") as file:
            table: Table = file.get_tensor("logps")
            written = (file.metadata() or {}).get("xxh3")
        if table.dtype != np.float32 or table.shape != (num_answers,):
            raise ValueError(f"{table.dtype} {table.shape}, not float32 ({num_answers},)")
        if written != _checksum(table):
            raise ValueError("its checksum is not that of its content")
        return table

    def write(self, table: Table) -> None:
        """Replaces the whole file. Raises ConfigError if it can't be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with write_then_rename(self.path, durable=False) as partial:
                save_file({"logps": table}, partial, metadata={"xxh3": _checksum(table)})
        except (OSError, SafetensorError) as error:
            fix = "free some space, or set dpo.reference.cache_dir to another folder"
            raise ConfigError(Problem(str(self.path), str(error), "a file that can be written", fix)) from error


def _checksum(table: Table) -> str:
    return xxhash.xxh3_64_hexdigest(table.tobytes())


def positions_by_use(loader: GlobalBatchLoader, steps: int | None) -> npt.NDArray[np.int64]:
    """int64 [pairs used]: the positions of the pairs in `steps` global batches over all epochs (None: in one epoch), in
    the order of their first use."""
    taken = np.zeros(len(loader.dataset), dtype=bool)
    parts = []
    left = loader.batches_per_epoch if steps is None else steps
    epoch = 0
    while left > 0 and not taken.all():
        batches = min(left, loader.batches_per_epoch)
        order = np.concatenate(loader.cut(loader.order(epoch))[:batches])
        _, first = np.unique(order, return_index=True)  # a mixture may use a pair twice
        order = order[np.sort(first)]
        parts.append(order[~taken[order]])
        taken[order] = True
        left, epoch = left - batches, epoch + 1
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def compute_missing(
    reference: ResidentReference,
    loader: GlobalBatchLoader,
    positions: npt.NDArray[np.int64],
    table: Table,
    parallel: ParallelContext,
    *,
    after_some: Callable[[Table], None],
) -> Table:
    """`table`, with the missing pairs among `positions` [N] computed. The result is the same on every rank.

    after_some(table): called on every rank with the table so far, every SAVE_EVERY_BATCHES global batches and at the end.
    Collectives: those of model and pipeline, and an all-reduce of [answers] before each call of after_some.
    """
    table = table.copy()
    missing = positions[np.isnan(table[loader.answers[positions]]).any(axis=1)]
    done: list[npt.NDArray[np.int64]] = []
    mine: list[tuple[npt.NDArray[np.int64], torch.Tensor]] = []
    batches = len(loader.cut(missing))
    for number, (chosen, plan) in enumerate(loader.deals_of(missing), start=1):
        packs = [loader.pack(chosen[numbers]) for numbers in plan[parallel.grid.dp_rank]]
        logps = reference.logps(packs)
        if parallel.grid.tp_rank == parallel.grid.cp_rank == 0:  # the other ranks of these groups have the same numbers
            new = _new_answers(loader, chosen, plan, parallel.grid.dp_rank, packs, done)
            mine += zip(new, logps, strict=False)  # only the last pipeline stage has logps
        loader.dataset.release()
        done.append(loader.answers[chosen].ravel())
        if number % SAVE_EVERY_BATCHES == 0 or number == batches:
            _share(table, np.concatenate(done), mine, parallel.device)
            done, mine = [], []
            after_some(table)
    return table


def _new_answers(
    loader: GlobalBatchLoader,
    positions: npt.NDArray[np.int64],
    plan: Sequence[Sequence[Sequence[int]]],
    rank: int,
    packs: Sequence[PackedBatch],
    done: Sequence[npt.NDArray[np.int64]],
) -> list[npt.NDArray[np.int64]]:
    """Of each pack of this rank, int64 [K]: the numbers of its answers; -1 if the answer is in `done`, or an earlier rank or
    pack of this global batch has it too. So each answer counts once."""
    before = [pair for earlier in plan[:rank] for pack in earlier for pair in pack]
    known = np.concatenate([*done, loader.answers[positions[np.array(before, dtype=np.int64)]].ravel()])
    numbers: list[npt.NDArray[np.int64]] = []
    for pairs, pack in zip(plan[rank], packs, strict=True):
        of_rows = np.empty(pack.num_answers, dtype=np.int64)
        of_rows[pack.pairs.numpy()] = loader.answers[positions[pairs]]
        new = np.where(np.isin(of_rows, known), -1, of_rows)
        numbers.append(new)
        known = np.concatenate([known, new])
    return numbers


def _share(
    table: Table,
    done: npt.NDArray[np.int64],
    mine: list[tuple[npt.NDArray[np.int64], torch.Tensor]],
    device: torch.device,
) -> None:
    """Copies every rank's results into every rank's table, by a sum in which only one rank's term of an answer isn't 0."""
    found = np.zeros_like(table)
    for numbers, logps in mine:
        found[numbers[numbers >= 0]] = logps.cpu().numpy()[numbers >= 0]
    total = torch.from_numpy(found).to(device)
    dist.all_reduce(total)
    table[done] = total.cpu().numpy()[done]
