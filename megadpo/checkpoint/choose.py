"""Chooses a checkpoint of a run: the newest, the best by a validation metric, or the one of a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from megadpo.checkpoint.folder import CheckpointInfo, complete_checkpoints
from megadpo.config.metric import METRICS, parse_metric_name
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import HOLDOUT
from megadpo.model.weights.convert import is_megatron_folder


def checkpoints_in(folder: Path) -> list[Path]:
    """[folder] if it is a checkpoint; else the checkpoints of a run's folder, by step. Raises ConfigError where there is
    none."""
    return [folder] if is_megatron_folder(folder) else [info.path for info in _of_run(folder)]


def choose_checkpoint(folder: Path, *, step: int | None = None, best: bool = False) -> Path:
    """`folder` if it is a checkpoint; else one of a run's folder (checkpointing.checkpoint_dir), by default the newest.

    best: by the run's checkpointing.metric_name, or by the loss of its only validation set. Raises ConfigError.
    """
    if is_megatron_folder(folder):
        if step is not None or best:
            expected = "the folder of a run, which --step and --best choose from"
            raise ConfigError(Problem(str(folder), "one checkpoint", expected, "leave --step and --best out"))
        return folder
    found = _of_run(folder)
    if step is not None:
        chosen = [info for info in found if info.position.step == step]
        if not chosen:
            steps = ", ".join(str(info.position.step) for info in found)
            raise ConfigError(Problem("--step", step, f"one of {steps}", f"these are in {folder}"))
        return chosen[0].path
    return _best(found).path if best else found[-1].path


def _of_run(folder: Path) -> list[CheckpointInfo]:
    found = complete_checkpoints(folder)
    if not found:
        expected = "a checkpoint, or a run's checkpointing.checkpoint_dir with complete checkpoints"
        fix = "give a folder that a training run or megadpo import has finished writing"
        below = sorted(path.parent for path in folder.glob("*/step_*") if is_megatron_folder(path))
        if below:
            fix = f"did you mean {below[0]}?"
        raise ConfigError(Problem(str(folder), "no complete checkpoint", expected, fix))
    return found


def _best(found: list[CheckpointInfo]) -> CheckpointInfo:
    """The best checkpoint; the newest of equally good ones."""
    metric, higher_is_better = _ranked_by(found[-1])
    measured = [info for info in found if not math.isnan(_value(info, metric))]
    if not measured:
        fix = "give --step N, or leave --best out for the newest"
        raise ConfigError(Problem("--best", metric, f"a metric that a checkpoint in {found[0].path.parent} has", fix))
    sign = 1 if higher_is_better else -1
    return max(measured, key=lambda info: (sign * _value(info, metric), info.position.step))


def _value(info: CheckpointInfo, metric: str) -> float:
    value = info.position.metrics.get(metric)
    return math.nan if value is None else value


def _ranked_by(info: CheckpointInfo) -> tuple[str, bool]:
    """(logged name of the metric that checkpoints are compared by, whether higher is better)."""
    cfg: dict[str, Any] = yaml.safe_load((info.path / "config.yaml").read_text(encoding="utf-8"))
    name = cfg["checkpointing"]["metric_name"]
    if name is not None:
        sets = [*(cfg["data"]["val_data_paths"] or {}), *([HOLDOUT] if cfg["data"].get("holdout") else [])]
        return parse_metric_name(name, sets).key, cfg["checkpointing"]["higher_is_better"]
    losses = sorted(one for one in info.position.metrics if one.startswith("validation-") and one.endswith("/loss"))
    losses = [one for one in losses if one.count("/") == 1]
    if len(losses) != 1:
        expected = f"a run with checkpointing.metric_name, or with one validation set (it measured {losses})"
        fix = "give --step N, or leave --best out for the newest"
        raise ConfigError(Problem("--best", str(info.path.parent), expected, fix))
    return losses[0], bool(METRICS["loss"].higher_is_better)
