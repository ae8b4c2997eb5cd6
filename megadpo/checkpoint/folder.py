"""The checkpoint folder: names, which ones are complete, and which ones go.

    <checkpoint_dir>/step_<N>/model/         megatron-core distributed checkpoint: weights, optimizer state
                              hf/            config.json and tokenizer files, as they came from Hugging Face
                              rng/           random-number states, one file a rank
                              config.yaml    the resolved config of the run
                              megadpo.json   written last inside; holds the TrainingPosition
A checkpoint under construction is called .step_<N>.partial and is renamed when whole; one that goes is renamed to
.deleted.step_<N> first.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megadpo.checkpoint.position import TrainingPosition
from megadpo.config.problems import ConfigError, Problem

FORMAT = 1
DELETED_PREFIX = ".deleted."
STEP_FOLDER = re.compile(r"step_\d+")


@dataclass(frozen=True)
class CheckpointInfo:
    """One complete checkpoint."""

    path: Path
    position: TrainingPosition
    world_size: int
    layout: str
    has_optimizer: bool
    optimizer_format: str


def partial_folder(final: Path) -> Path:
    """Where `final` is put together before it is renamed."""
    return final.parent / f".{final.name}.partial"


def read_info(path: Path) -> CheckpointInfo:
    """The record of a complete checkpoint. Raises OSError, ValueError or KeyError for anything else."""
    record = json.loads((path / "megadpo.json").read_text())
    if record["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {record['format']}, this version reads {FORMAT}")
    return CheckpointInfo(
        path=path,
        position=TrainingPosition(**record["position"]),
        world_size=record["world_size"],
        layout=record["layout"],
        has_optimizer=record["has_optimizer"],
        optimizer_format=record["optimizer_format"],
    )


def complete_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Complete checkpoints in `folder`, by step. A folder without megadpo.json is not one of ours, or not complete.
    Raises ConfigError for one that megadpo.json doesn't make a run's checkpoint."""
    found = []
    for path in folder.glob("step_*"):
        if STEP_FOLDER.fullmatch(path.name) and (path / "megadpo.json").is_file():
            try:
                found.append(read_info(path))
            except (OSError, ValueError, KeyError, TypeError) as error:
                expected = f"the record of a checkpoint that a run has finished ({type(error).__name__}: {error})"
                fix = "move the folder away from the run's checkpoints"
                raise ConfigError(Problem(str(path / "megadpo.json"), "another one", expected, fix)) from error
    return sorted(found, key=lambda info: info.position.step)


def newest_checkpoint(folder: Path) -> CheckpointInfo | None:
    """The complete checkpoint with the highest step, or None."""
    return max(complete_checkpoints(folder), key=lambda info: info.position.step, default=None)


def prune_checkpoints(
    folder: Path, *, keep_top_k: int | None, metric: str | None, higher_is_better: bool
) -> list[Path]:
    """Delete all but the `keep_top_k` best by `metric` (the newest, where None) and the newest, which a resume needs.

    A checkpoint that lacks the metric, or has NaN there, counts as the worst. Returns what was deleted.
    """
    found = complete_checkpoints(folder)
    if keep_top_k is None or len(found) <= keep_top_k:
        return []

    def goodness(info: CheckpointInfo) -> tuple[float, int]:
        if metric is None:
            return (0.0, info.position.step)
        value = info.position.metrics.get(metric, math.nan)
        value = value if value is not None else math.nan
        signed = value if higher_is_better else -value
        return (-math.inf if math.isnan(signed) else signed, info.position.step)

    kept = {info.path for info in sorted(found, key=goodness, reverse=True)[:keep_top_k]} | {found[-1].path}
    gone = [info.path for info in found if info.path not in kept]
    for path in gone:
        delete(path)
    return gone


def delete(checkpoint: Path) -> None:
    """Take a checkpoint away whole: under its own name there is never a part of it, whenever the process dies. What can't
    be deleted (a file that another node has open, say) stays under the other name until the next call."""
    aside = checkpoint.parent / f"{DELETED_PREFIX}{checkpoint.name}"
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    for left in checkpoint.parent.glob(f"{DELETED_PREFIX}step_*"):
        shutil.rmtree(left, ignore_errors=True)
