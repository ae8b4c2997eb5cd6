"""Finds the checkpoint to resume from, the same on every rank, and refuses one that doesn't fit the run."""

from __future__ import annotations

import dataclasses
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import yaml

from megadpo.checkpoint import CheckpointInfo, damages_together
from megadpo.checkpoint.folder import require_info, step_folders
from megadpo.config.load import as_written
from megadpo.config.problems import ConfigError, Problem, SaveError, UserError
from megadpo.config.schema import Config
from megadpo.data.pairs import OpenedPairs
from megadpo.files.atomic import move_aside
from megadpo.lora.checkpoint import BASE
from megadpo.lora.peft_folder import adapter_fingerprint
from megadpo.model.manifest import checkpoint_before, no_manifest
from megadpo.model.source import ModelSource, weights_fingerprint
from megadpo.parallel import ParallelContext
from megadpo.train.inputs import RunInputs

FIELD = "checkpointing.checkpoint_dir"
OWNER_FILE = ".run"
SEEN_WITHIN_S = 30.0
"""The longest time in which a network file system shows a new file on another node."""
REFERENCE = "dpo.reference"
ORDER = "order of an epoch"
_OF_ADAPTERS = ("target_modules", "exclude_modules", "dim", "alpha", "use_rslora", "lora_dtype")
"""The keys of `peft` that decide which adapters there are, and what their weights mean."""


def find_resume(
    cfg: Config, data: OpenedPairs, settings: dict[str, Any], parallel: ParallelContext
) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest checkpoint, as rank 0 sees it, or None, and notes for the user. settings: `data_settings` of this run.

    Raises ConfigError on every rank if the folder can't be written or differs between nodes, if the checkpoint is damaged,
    or if it was trained with other data, another order or another reference. Collectives: a broadcast, an all-gather,
    and those of `newest_whole`.
    """
    if not cfg.checkpointing.enabled:
        return None, []
    folder = Path(cfg.checkpointing.checkpoint_dir)
    require_shared(folder, parallel)
    info, notes = newest_whole(folder, parallel, on_damage=cfg.checkpointing.on_damage)
    if info is None:
        return None, notes
    fix = f"use what {info.path} was trained with, or start a new run in another {FIELD}"
    problems = []
    if info.position.data_fingerprint != data.fingerprint:
        expected = f"the pairs and tokenisation that {info.path} was trained on"
        problems.append(Problem("data.train_data_path", data.report.path, expected, fix))
    for field, before in info.position.data_settings.items():
        if field == REFERENCE and settings[field] != before:
            problems.append(_other_reference(cfg, info, fix))
        elif field == BASE and settings[field] != before:
            expected = f"the model whose adapters are in {info.path}, with the weights that it had"
            problems.append(Problem(BASE, cfg.policy.model_name, expected, fix))
        elif field == ORDER and settings[field] != before:
            expected = (
                f"{before}, as in {info.path}: in another order the epoch would repeat pairs and leave out others"
            )
            keys = "data.group_prompts, policy.sequence_packing and dpo.loss_type decide it"
            problems.append(Problem(ORDER, settings[field], expected, f"{fix}; {keys}"))
        elif settings[field] != before:
            problems.append(Problem(field, settings[field], f"{before}, as in {info.path}", fix))
    if problems:
        raise ConfigError(problems)
    return info, notes


def require_optimizer(info: CheckpointInfo) -> None:
    """Raises ConfigError if the checkpoint `info` has no optimizer state."""
    if not info.has_optimizer:
        expected = "a checkpoint with optimizer state to resume from; this one was saved with checkpointing.save_optimizer false"
        fix = "start in another checkpoint_dir with policy.model_name set to this folder"
        raise ConfigError(Problem(FIELD, str(info.path), expected, fix))


def newest_whole(
    folder: Path, parallel: ParallelContext, *, on_damage: Literal["stop", "previous"]
) -> tuple[CheckpointInfo | None, list[str]]:
    """The newest undamaged checkpoint of the run, and a note for each one that is damaged or can't be verified.

    on_damage "previous": damaged checkpoints are renamed to step_<N>.damaged, and the one before is used. Raises
    ConfigError on every rank, with the damaged files; also if no undamaged one is left. Collectives: two broadcasts and an
    all-gather of pickled objects, and three more for each damaged checkpoint.
    """
    notes: list[str] = []
    while (path := from_first_rank(parallel, lambda: next(reversed(step_folders(folder)), None))) is not None:
        problems, has_manifest = damages_together(path)
        if not problems:
            notes += [] if has_manifest else [no_manifest(path)]
            return from_first_rank(parallel, partial(require_info, path)), notes
        before = checkpoint_before(path)
        if on_damage == "stop" or before is None:
            raise ConfigError(dataclasses.replace(one, fix=_way_on(path, before)) for one in problems)
        aside = from_first_rank(parallel, partial(move_aside, path))
        notes.append(f"{path} is damaged ({problems[0].where}: {problems[0].value}); it is now {aside.name}")
    return None, notes


def _way_on(damaged: Path, before: Path | None) -> str:
    move = f"mv {damaged} {damaged}.damaged"
    if before is None:
        return f"copy the checkpoint again from an undamaged copy; there is no earlier one; for a new run: {move}"
    return f"{move}; then the run resumes from the one before, {before}; checkpointing.on_damage=previous does the same"


def data_settings(cfg: Config, inputs: RunInputs, parallel: ParallelContext) -> dict[str, Any]:
    """The settings that must not change when a run resumes, besides the pairs. They decide which pairs a step uses, which
    weights the optimizer has, what they are added to (LoRA), and what the reference is. Collectives: two broadcasts."""
    peft = cfg.policy.megatron_cfg.peft
    return {
        "dpo.seed": cfg.dpo.seed,
        "data.shuffle": cfg.data.shuffle,
        "data.drop_last": cfg.data.drop_last,
        ORDER: inputs.train_loader.order_unit,
        "data.train_data_path weights": None if cfg.data.train_shares is None else list(cfg.data.train_shares),
        "policy.train_global_batch_size": cfg.policy.train_global_batch_size,
        "policy.freeze": list(cfg.policy.freeze),
        "policy.megatron_cfg.freeze_moe_router": cfg.policy.megatron_cfg.freeze_moe_router,
        "policy.megatron_cfg.peft": {name: _listed(getattr(peft, name)) for name in _OF_ADAPTERS}
        if peft.enabled
        else None,
        BASE: from_first_rank(parallel, lambda: weights_fingerprint(inputs.source, every_tensor=True))
        if peft.enabled
        else None,
        REFERENCE: from_first_rank(parallel, lambda: _reference_fingerprint(cfg, inputs.reference)),
    }


def changes(cfg: Config, info: CheckpointInfo) -> list[str]:
    """A line for each setting of objective, optimizer or schedule that differs from those of the checkpoint `info`. Such
    changes are allowed; the user is told."""
    file = info.path / "config.yaml"
    try:
        before = dict(_flat(yaml.safe_load(file.read_text()), ""))
    except (OSError, ValueError, yaml.YAMLError) as error:  # possible if the checkpoint could not be verified
        fix = "copy the checkpoint again from an undamaged copy"
        raise ConfigError(Problem(str(file), str(error), "the config of the run that wrote it", fix)) from error
    watched = ("dpo.", "policy.max_grad_norm", "policy.megatron_cfg.optimizer.", "policy.megatron_cfg.scheduler.")
    return [
        f"changed since {info.path.name}: {key} {value!r}, which was {before[key]!r}"
        for key, value in _flat(as_written(cfg), "")
        if key.startswith(watched) and not key.startswith("dpo.val_") and key in before and before[key] != value
    ]


def require_shared(folder: Path, parallel: ParallelContext) -> None:
    """Creates `folder`, and checks that every rank can write there and sees a file of rank 0. Otherwise the first save would
    fail after hours of training. Raises ConfigError on every rank. Collectives: a broadcast, an all-gather."""
    name = from_first_rank(parallel, lambda: _write_mark(folder))
    problem = _look_for(folder, folder / name)
    found: list[str | None] = [None] * parallel.world_size
    dist.all_gather_object(found, problem)
    if parallel.rank == 0:
        (folder / name).unlink(missing_ok=True)
    if unusable := sorted({one for one in found if one is not None}):
        expected = f"one folder that every node can write ({'; '.join(unusable)})"
        raise ConfigError([Problem(FIELD, str(folder), expected, "choose one on a shared file system")])


def claim(folder: Path) -> str:
    """Marks `folder` as this run's, for `require_owner`. Rank 0 only. The run that started last owns the folder."""
    token = f"{uuid.uuid4().hex} on {socket.gethostname()}"
    (folder / OWNER_FILE).write_text(token + "\n")
    return token


def require_owner(folder: Path, token: str) -> None:
    """Raises SaveError if another run has called `claim` for this folder since. A requeued job may start before the old one
    has ended, and the files of two runs must not mix."""
    mark = folder / OWNER_FILE
    if mark.exists() and (now := mark.read_text().strip()) != token:
        raise SaveError(f"another run has started in {folder} ({now}); this run ends without saving")


def from_first_rank(parallel: ParallelContext, get: Any) -> Any:
    """The result of `get()` on rank 0, for every rank. (Nodes may see different states of a network file system.) A
    UserError is raised on every rank. Collectives: a broadcast of a pickled object."""
    shared: list[Any] = [None, None]
    if parallel.rank == 0:
        try:
            shared[0] = get()
        except UserError as error:
            shared[1] = error.problems
    dist.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise ConfigError(shared[1])
    return shared[0]


def _reference_fingerprint(cfg: Config, reference: ModelSource) -> str | None:
    if cfg.dpo.reference.mode == "none":
        return None
    named = cfg.dpo.reference.adapter
    model = "adapter_off" if cfg.dpo.reference.mode == "adapter_off" else weights_fingerprint(reference)  # or BASE's
    return model if named is None else f"{model} {adapter_fingerprint(named)}"


def _listed(value: Any) -> Any:
    """The value after writing it to JSON and reading it back."""
    return list(value) if isinstance(value, tuple) else value


def _other_reference(cfg: Config, info: CheckpointInfo, fix: str) -> Problem:
    named = cfg.dpo.reference.model_name
    field, value = (f"{REFERENCE}.model_name", named) if named else ("policy.model_name", cfg.policy.model_name)
    if cfg.dpo.reference.mode == "none":
        field, value = f"{REFERENCE}.mode", "none"
    return Problem(field, value, f"the reference with which {info.path} was trained (or none, if it had none)", fix)


def require_writable(folder: Path, field: str) -> None:
    """Creates `folder` and writes a file there. Raises ConfigError for `field` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        fix = "choose another folder, or free some space, or change its permissions"
        raise ConfigError([Problem(field, str(folder), f"a folder that can be written ({error})", fix)]) from error


def _write_mark(folder: Path) -> str:
    require_writable(folder, FIELD)
    name = f".seen-by-all-{uuid.uuid4().hex}"
    (folder / name).touch()
    return name


def _look_for(folder: Path, mark: Path) -> str | None:
    """What is wrong with the folder on this rank, or None."""
    host, deadline = socket.gethostname(), time.monotonic() + SEEN_WITHIN_S
    while not mark.exists():
        if time.monotonic() > deadline:
            return f"{host} does not see what rank 0 writes there"
        time.sleep(0.2)
    try:
        require_writable(folder, FIELD)
    except ConfigError as error:
        return f"{host}: {error.problems[0].expected}"
    return None


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for name, value in tree.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
