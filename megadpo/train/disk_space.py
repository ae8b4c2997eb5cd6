"""Whether the disk has space for the checkpoints of a run, before the run begins."""

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
    """Refuses a run whose next checkpoint doesn't fit on the disk; a note where that one fits, but not all that are to be
    kept. step: where training starts.

    Every node sees the same folder (`require_shared`, which has made it), so rank 0 looks, for a checkpoint of all ranks.
    Raises ConfigError on every rank. Collectives: a broadcast of a pickled object.
    """
    saving = cfg.checkpointing
    if not saving.enabled:
        return []
    saves = total_steps // saving.save_period - step // saving.save_period + (total_steps % saving.save_period > 0)
    notes: list[str] = from_first_rank(parallel, lambda: space_notes(saving, checkpoint_bytes(arch, cfg), saves))
    return notes


def space_notes(saving: CheckpointingConfig, size: CheckpointBytes, saves: int) -> list[str]:
    """The note of `require_space`, for a run that saves so many times more. Raises ConfigError where one save is too many."""
    folder = Path(saving.checkpoint_dir)
    free, each = free_bytes(folder), size.with_optimizer if saving.save_optimizer else size.weights
    if free is None:
        return []
    if each > free:
        expected = f"space for a checkpoint: {each:,} bytes of tensors are to be written, {free:,} bytes are free there"
        fix = "make room, or choose another folder"
        if saving.save_optimizer and size.weights <= free:
            fix += f"; checkpointing.save_optimizer: false saves {size.weights:,} bytes, but no run resumes from them"
        raise ConfigError(Problem(FIELD, saving.checkpoint_dir, expected, fix))
    more, kept = saves, "all checkpoints"
    if saving.keep_top_k is not None:
        newest_beside_the_best = saving.metric_name is not None
        most = saving.keep_top_k + newest_beside_the_best + 1  # which is being written
        more = min(saves, most - len(complete_checkpoints(folder)))
        kept = f"keep_top_k {saving.keep_top_k}, and one that is being written"
    if more * each <= free:
        return []
    return [
        f"{folder}: {more} checkpoints more ({kept}) take {more * each:,} bytes of tensors, {free:,} bytes are free there: "
        "make room before the disk is full, or lower checkpointing.keep_top_k"
    ]


def free_bytes(folder: Path) -> int | None:
    """What new checkpoints may take; unfinished ones there are deleted before. None where the file system says nothing, or
    nothing that can be: some count no bytes at all, and no byte free is wrong after `require_shared` has written one. A
    quota that it doesn't count is not seen."""
    try:
        disk = shutil.disk_usage(folder)
    except OSError:
        return None
    return disk.free + unfinished_bytes(folder) if 0 < disk.free <= disk.total else None
