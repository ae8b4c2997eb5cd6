"""What the policy is compared with: a copy of the model beside it, or log-probabilities computed before training."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megadpo.checkpoint import load_weights
from megadpo.config.schema import Config
from megadpo.model.build import build_model
from megadpo.model.source import weights_fingerprint
from megadpo.parallel import ParallelContext
from megadpo.reference import LogpsCache, ResidentReference, compute_missing, positions_by_use
from megadpo.reference.cached import Table
from megadpo.train.inputs import TRAIN, RunInputs
from megadpo.train.resume import from_first_rank, require_writable

Positions = npt.NDArray[np.int64]
FORMAT = 1
"""Counted up by a change after which the same model gives other log-probabilities."""


def build_reference(cfg: Config, inputs: RunInputs, parallel: ParallelContext) -> ResidentReference:
    """The frozen reference of `dpo.reference`, loaded."""
    model = build_model(inputs.reference_arch, cfg.policy, parallel, frozen=True)
    load_weights(model, inputs.reference, inputs.reference_arch, parallel)
    return ResidentReference(model, parallel)


def cache_folder(cfg: Config) -> Path:
    """Where the log-probabilities are kept; ~ is the home folder, as in data.cache_dir."""
    named = cfg.dpo.reference.cache_dir
    return Path(cfg.checkpointing.checkpoint_dir) / "reference" if named is None else Path(named).expanduser()


def attach_logps(
    cfg: Config, inputs: RunInputs, parallel: ParallelContext, total_steps: int
) -> tuple[RunInputs, list[str]]:
    """The inputs, with loaders that bring the reference's log-probabilities of every pair that the run will see: from the
    files of `dpo.reference.cache_dir`, and computed, and written there, where those lack some. The model is gone afterwards.

    With them a line a data set. Raises ConfigError, on every rank, where the folder can't be written. Collectives: a
    broadcast a data set, and where something is computed one a write, those of the model and of `compute_missing`.
    """
    folder = cache_folder(cfg)
    model = from_first_rank(parallel, lambda: _describe(cfg, inputs))
    reference: ResidentReference | None = None
    loaders = {}
    lines = []
    for key, loader in inputs.loaders.items():
        name, steps = ("train", total_steps) if key == TRAIN else (key, None)
        cache = LogpsCache(folder / f"{name}-{_digest({**model, 'data': loader.dataset.fingerprint})}.safetensors")
        positions = positions_by_use(loader, steps)
        table = from_first_rank(parallel, partial(cache.read, len(loader.dataset)))
        known = _known(table, positions)
        if known < len(positions):
            if reference is None:
                from_first_rank(parallel, partial(require_writable, folder, "dpo.reference.cache_dir"))
                reference = build_reference(cfg, inputs, parallel)
            keep = partial(_keep, cache, name, positions, parallel)
            table = compute_missing(reference, loader, positions, table, parallel, after_some=keep)
        loaders[key] = loader.with_reference_logps(table)
        lines.append(f"reference log-probabilities of {name}: {known} of {len(positions)} pairs from {cache.path}")
        broken = positions[~np.isfinite(table[positions]).all(axis=1)]
        if len(broken):
            rows = ", ".join(str(row) for row in loader.dataset.rows[broken[:3]])
            lines.append(f"  not finite for {len(broken)} pairs of {name}, the first in rows {rows} (from 0)")
    if reference is not None:
        del reference
        gc.collect()  # a layer that refers to itself keeps its weights until the garbage collector runs
        if parallel.device.type == "cuda":
            torch.cuda.empty_cache()
    return dataclasses.replace(inputs, loaders=loaders), lines


def _describe(cfg: Config, inputs: RunInputs) -> dict[str, str]:
    """What the numbers depend on, beside the data; not the layout, which changes them by rounding only."""
    fp8 = cfg.policy.megatron_cfg.fp8_cfg
    return {
        "format": str(FORMAT),
        "weights": weights_fingerprint(inputs.reference, every_tensor=True),
        "architecture": inputs.reference_arch.fingerprint,
        "precision": cfg.policy.precision,
        "fp8": f"{fp8.fp8} {fp8.fp8_recipe}" if fp8.enabled else "",
    }


def _digest(description: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _known(table: Table, positions: Positions) -> int:
    return int((~np.isnan(table[positions]).any(axis=1)).sum())


def _keep(cache: LogpsCache, name: str, positions: Positions, parallel: ParallelContext, table: Table) -> None:
    from_first_rank(parallel, partial(cache.write, table))
    if parallel.rank == 0:
        known = f"{_known(table, positions)} of {len(positions)} pairs"
        print(f"reference log-probabilities of {name}: {known}", flush=True)
