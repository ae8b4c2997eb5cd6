"""The reference's log-probabilities of a data set, computed once and kept in a file.

Pairs are computed in the order and the packs in which training will first see them. So in the same layout the first
epoch has the very bits that a resident reference would give; another layout, a later epoch and a file of another run
have the same numbers but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megadpo.config.problems import ConfigError, Problem
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.files.atomic import write_then_rename
from megadpo.parallel import ParallelContext
from megadpo.reference.resident import ResidentReference

Table = npt.NDArray[np.float32]
"""[pairs, 2]: logps of chosen and rejected answer by position in the data set, in nats; NaN: not computed."""

SAVE_EVERY_BATCHES = 20
"""Global batches computed between two writes of the file: what an interrupted start loses at most."""


@dataclass(frozen=True)
class LogpsCache:
    """The file of one data set under one reference; rank 0 alone reads and writes it."""

    path: Path

    def read(self, num_pairs: int) -> Table:
        """[num_pairs, 2], NaN where nothing is known. Raises ConfigError for a file that isn't such a table."""
        try:
            if not self.path.exists():
                return np.full((num_pairs, 2), np.nan, dtype=np.float32)
            table: Table = load_file(self.path)["logps"]
            fits = table.shape == (num_pairs, 2) and table.dtype == np.float32
            found = f"{table.dtype} {table.shape}"
        except (OSError, SafetensorError, KeyError) as error:
            fits, found = False, str(error)
        if not fits:
            expected = f"float32 ({num_pairs}, 2): the log-probabilities of these pairs"
            raise ConfigError([Problem(str(self.path), found, expected, "delete the file, to have it computed anew")])
        return table

    def write(self, table: Table) -> None:
        """Replace the file as a whole. Raises ConfigError where there is no room for it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with write_then_rename(self.path, durable=False) as partial:
                save_file({"logps": table}, partial)
        except (OSError, SafetensorError) as error:
            fix = "make room, or set dpo.reference.cache_dir to another folder"
            raise ConfigError(Problem(str(self.path), str(error), "a file that can be written", fix)) from error


def positions_by_use(loader: GlobalBatchLoader, steps: int | None) -> npt.NDArray[np.int64]:
    """int64 [pairs used]: the positions that `steps` global batches take, epoch after epoch, each where it is first
    taken; None: one epoch."""
    taken = np.zeros(len(loader.dataset), dtype=bool)
    parts = []
    left = loader.batches_per_epoch if steps is None else steps
    epoch = 0
    while left > 0 and not taken.all():
        batches = min(left, loader.batches_per_epoch)
        order = loader.order(epoch)[: batches * loader.global_batch_size]
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
    """`table` with the pairs at `positions` [N] that it lacks, the same on every rank.

    after_some(table): called on every rank with what there is so far, every SAVE_EVERY_BATCHES global batches and at
    the end. Collectives: the model's and the pipeline's; an all-reduce of [pairs, 2] before each call of after_some.
    """
    table = table.copy()
    missing = positions[np.isnan(table[positions]).any(axis=1)]
    done: list[npt.NDArray[np.int64]] = []
    mine: list[tuple[npt.NDArray[np.int64], torch.Tensor]] = []
    batches = -(-len(missing) // loader.global_batch_size)
    for number, (chosen, plan) in enumerate(loader.deals_of(missing), start=1):
        packs = [chosen[numbers] for numbers in plan[parallel.grid.dp_rank]]
        logps = reference.logps([loader.pack(pack) for pack in packs])
        if parallel.grid.tp_rank == parallel.grid.cp_rank == 0:  # the others have the same numbers
            mine += zip(packs, logps, strict=False)  # no logps but on the last pipeline stage
        loader.dataset.release()
        done.append(chosen)
        if number % SAVE_EVERY_BATCHES == 0 or number == batches:
            _share(table, np.concatenate(done), mine, parallel.device)
            done, mine = [], []
            after_some(table)
    return table


def _share(
    table: Table,
    done: npt.NDArray[np.int64],
    mine: list[tuple[npt.NDArray[np.int64], torch.Tensor]],
    device: torch.device,
) -> None:
    """Put every rank's results into every rank's table: sums in which each pair has one term that isn't 0."""
    found = np.zeros_like(table)
    for pack, logps in mine:
        found[pack] = logps.reshape(-1, 2).cpu().numpy()
    everyones = torch.from_numpy(found).to(device)
    dist.all_reduce(everyones)
    table[done] = everyones.cpu().numpy()[done]
