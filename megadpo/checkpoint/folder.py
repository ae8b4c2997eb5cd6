"""The checkpoint folder: names, which ones are complete, and which ones go.

    <checkpoint_dir>/step_<N>/model/         megatron-core distributed checkpoint: weights, optimizer state
                              hf/            an export but for the weights: configs, tokenizer, model card
                              rng/           random-number states, one file a rank
                              config.yaml    the resolved config of the run
                              megadpo.json   holds the TrainingPosition, and says that there is a manifest
                              manifest.json  written last inside: size and checksums of every other file, and of itself
A checkpoint under construction is called .step_<N>.partial and is renamed when whole; one that goes is renamed to
.deleted.step_<N> first. So a step_<N> with manifest.json or model/ and without megadpo.json is damaged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megadpo.config.problems import ConfigError, Problem
from megadpo.model.manifest import INFO_FILE, MANIFEST_FILE, step_number

FORMAT = 1
DELETED_PREFIX = ".deleted."


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """Where a run stands, apart from tensors: what resuming needs to go on with the very next batch.

    Counts are of completed work; the next batch is number `batch` of epoch `epoch`, both from 0.
    """

    step: int
    epoch: int
    batch: int
    skipped_steps: int = 0
    data_fingerprint: str = ""
    """Of the training pairs as tokenised; a resume on other data is refused."""
    data_settings: dict[str, Any] = field(default_factory=dict)
    """What else a resumed run must not change: seed, shuffle, global batch size, frozen weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of this very step, by their logged names; validation among them where it ran after this step."""


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
    record = json.loads((path / INFO_FILE).read_text())
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


def step_folders(folder: Path) -> list[Path]:
    """What is or was a checkpoint of the run, by step."""
    parts = (INFO_FILE, MANIFEST_FILE, "model")
    steps = {number: path for path in folder.glob("step_*") if (number := step_number(path)) is not None}
    return [steps[number] for number in sorted(steps) if any((steps[number] / part).exists() for part in parts)]


def require_info(path: Path) -> CheckpointInfo:
    """`read_info` of a checkpoint of a run. Raises ConfigError where megadpo.json doesn't make it one."""
    try:
        info = read_info(path)
        if info.position.step != step_number(path):
            raise ValueError(f"it is of step {info.position.step}")
        return info
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = f"the record of a checkpoint that a run has finished ({type(error).__name__}: {error})"
        fix = "move the folder away from the run's checkpoints"
        raise ConfigError(Problem(str(path / INFO_FILE), "another one", expected, fix)) from error


def complete_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Complete checkpoints in `folder`, by step; those whose record can't be read are left out."""
    found = []
    for path in step_folders(folder):
        with contextlib.suppress(ConfigError):
            found.append(require_info(path))
    return found


def move_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that no run finds it; returns where it is now."""
    names = (f"{checkpoint.name}.damaged{number}" for number in ["", *range(2, 1000)])
    aside = next(path for name in names if not (path := checkpoint.parent / name).exists())
    os.replace(checkpoint, aside)
    return aside


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


def finish_deletions(folder: Path) -> None:
    """Delete what is left of checkpoints that a killed run was deleting."""
    _delete_all(folder, f"{DELETED_PREFIX}step_*")


def delete_unfinished(folder: Path) -> None:
    """Delete what is there of checkpoints that a killed run was writing. For the run that owns the folder."""
    _delete_all(folder, partial_folder(folder / "step_*").name)


def unfinished_bytes(folder: Path) -> int:
    """What `delete_unfinished` would make free."""
    found = 0
    for file in folder.glob(f"{partial_folder(folder / 'step_*').name}/**/*"):
        with contextlib.suppress(OSError):  # a run that ends now deletes it
            found += file.lstat().st_blocks * 512
    return found


def _delete_all(folder: Path, names: str) -> None:
    for left in folder.glob(names):
        shutil.rmtree(left, ignore_errors=True)


def delete(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it, so that its own name never stands for a part of it, even if the process dies.
    What can't be deleted (a file that another node has open) stays under the other name until `finish_deletions`."""
    aside = checkpoint.parent / f"{DELETED_PREFIX}{checkpoint.name}"
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)
