"""Checks at the start of a run that the disk has space for its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

from megadpo.checkpoint import complete_checkpoints, unfinished_bytes
from megadpo.checkpoint.size import CheckpointBytes, checkpoint_bytes
from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import CheckpointingConfig, Config
from megadpo.parallel import ParallelContext
from megadpo.train.resume import FIELD, from_first_rank


def require_space(
    cfg: Config, arch: Architecture, parallel: ParallelContext, *, step: int, total_steps: int
) -> list[str]:
    """Raises ConfigError if the next checkpoint doesn't fit on the disk. Returns a note if that one fits, but not all that will
    be kept. step: the step at which training starts.

    Rank 0 looks for all: `require_shared` has made the folder and checked that every node sees it. The error is raised on every
    rank. Collectives: a broadcast of a pickled object.
    """
    saving = cfg.checkpointing
    if not saving.enabled:
        return []
    saves = total_steps // saving.save_period - step // saving.save_period + (total_steps % saving.save_period > 0)
    notes: list[str] = from_first_rank(parallel, lambda: space_notes(saving, checkpoint_bytes(arch, cfg), saves))
    return notes


def space_notes(saving: CheckpointingConfig, size: CheckpointBytes, saves: int) -> list[str]:
    """The note of `require_space` for a run with this many saves left. Raises ConfigError if not even one fits."""
    folder = Path(saving.checkpoint_dir)
    free, each = free_bytes(folder), size.with_optimizer if saving.save_optimizer else size.weights
    if free is None:
        return []
    if each > free:
        expected = f"space for a checkpoint: it has {each:,} bytes of tensors, and {free:,} bytes are free"
        fix = "free some space, or choose another folder"
        if saving.save_optimizer and size.weights <= free:
            fix += f"; checkpointing.save_optimizer: false saves only {size.weights:,} bytes, but no run can resume from them"
        raise ConfigError(Problem(FIELD, saving.checkpoint_dir, expected, fix))
    more, kept = saves, "all checkpoints"
    if saving.keep_top_k is not None:
        newest_beside_the_best = saving.metric_name is not None
        most = saving.keep_top_k + newest_beside_the_best + 1  # 1: the one that is being written
        more = min(saves, most - len(complete_checkpoints(folder)))
        kept = f"keep_top_k {saving.keep_top_k}, and one that is being written"
    if more * each <= free:
        return []
    return [
        f"{folder}: {more} more checkpoints ({kept}) need {more * each:,} bytes, but {free:,} bytes are free: free some space "
        "before the disk is full, or keep fewer (checkpointing.keep_top_k)"
    ]


def free_bytes(folder: Path) -> int | None:
    """The free bytes, and those of unfinished checkpoints, which a run deletes. None if the file system gives no numbers or
    impossible ones: some report 0 bytes free, but `require_shared` has just written there. Quotas may not be included."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return None
    return disk.free + unfinished_bytes(folder) if 0 < disk.free <= disk.total else None
