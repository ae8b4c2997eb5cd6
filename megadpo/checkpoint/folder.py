"""The folders of checkpoints: their names, which of them are complete, and which are deleted.

    <checkpoint_dir>/step_<N>/model/         megatron-core distributed checkpoint: weights, optimizer state
                              hf/            an export without weights: configs, tokenizer, model card
                              rng/           random-number states, one file a rank
                              config.yaml    the resolved config of the run
                              megadpo.json   holds the TrainingPosition, and says that there is a manifest
                              manifest.json  written last: size and checksums of every other file, and of itself
A checkpoint is written as .step_<N>.partial and renamed when it is complete. Before it is deleted it is renamed to
.deleted.step_<N>. So a step_<N> with manifest.json or model/ but without megadpo.json is damaged.
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
    """How far a run has come: what a resume needs, besides tensors, to continue with the next batch.

    Counts are of completed work; the next batch is number `batch` of epoch `epoch`, both from 0.
    """

    step: int
    epoch: int
    batch: int
    skipped_steps: int = 0
    data_fingerprint: str = ""
    """Of the tokenised training pairs; a resume on other data is refused."""
    data_settings: dict[str, Any] = field(default_factory=dict)
    """Other settings that a resumed run must not change: seed, shuffle, global batch size, frozen weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of this step, by their logged names; validation's too, if it ran after this step."""


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
    """The folder that a checkpoint is written to, before it is renamed to `final`."""
    return final.parent / f".{final.name}.partial"


def read_info(path: Path) -> CheckpointInfo:
    """Reads megadpo.json of a complete checkpoint. Raises OSError, ValueError or KeyError for anything else."""
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
    """The run's checkpoints by step, damaged ones too."""
    parts = (INFO_FILE, MANIFEST_FILE, "model")
    steps = {number: path for path in folder.glob("step_*") if (number := step_number(path)) is not None}
    return [steps[number] for number in sorted(steps) if any((steps[number] / part).exists() for part in parts)]


def require_info(path: Path) -> CheckpointInfo:
    """`read_info` of a checkpoint of a run. Raises ConfigError if megadpo.json can't be read, or is of another step."""
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


def prune_checkpoints(
    folder: Path, *, keep_top_k: int | None, metric: str | None, higher_is_better: bool
) -> list[Path]:
    """Delete all checkpoints but the `keep_top_k` best by `metric` (None: the newest) and the newest, which a resume needs.

    A checkpoint without the metric, or with NaN, counts as the worst. Returns the deleted paths.
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
    """Finish deletions that a killed run began."""
    _delete_all(folder, f"{DELETED_PREFIX}step_*")


def delete_unfinished(folder: Path) -> None:
    """Delete partial checkpoints of a killed run. Only the run that owns the folder may call it."""
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
    """Rename a checkpoint, then delete it: even if the process dies, no incomplete checkpoint has the name step_<N>. Files
    that can't be deleted (another node has them open) stay under the new name until `finish_deletions`."""
    aside = checkpoint.parent / f"{DELETED_PREFIX}{checkpoint.name}"
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside, ignore_errors=True)
