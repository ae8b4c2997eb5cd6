"""The reference of a run: a model in memory, or log-probabilities that are computed before training."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megadpo.checkpoint import load_weights
from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.lora.adapter import LinearAdapter
from megadpo.lora.attach import REFERENCE, attach
from megadpo.lora.peft_folder import adapter_fingerprint, read_peft
from megadpo.model.build import build_model
from megadpo.model.gpt import PairModel
from megadpo.model.source import weights_fingerprint
from megadpo.parallel import ParallelContext
from megadpo.reference import LogpsCache, ResidentReference, compute_missing, positions_by_use
from megadpo.reference.cached import Table
from megadpo.train.inputs import TRAIN, RunInputs
from megadpo.train.resume import from_first_rank, require_writable

FORMAT = 3
"""Increase it after a change by which the same model gives other log-probabilities, or another file of them."""


def build_reference(cfg: Config, inputs: RunInputs, parallel: ParallelContext) -> ResidentReference:
    """The frozen reference of `dpo.reference`, with its weights loaded."""
    model = build_model(inputs.reference_arch, cfg.policy, parallel, frozen=True)
    load_weights(model, inputs.reference, inputs.reference_arch, parallel)
    reference_adapters(model, inputs.reference_arch, cfg, parallel)
    return ResidentReference(model, parallel)


def reference_adapters(
    model: Sequence[PairModel], arch: Architecture, cfg: Config, parallel: ParallelContext
) -> list[LinearAdapter]:
    """The adapters of `dpo.reference.adapter`, loaded and attached to `model`; empty if it names none. They are off if the
    model is the policy, which has its own. Raises ConfigError if the folder is no adapter of this model."""
    named = cfg.dpo.reference.adapter
    if named is None:
        return []
    found = read_peft(named, "dpo.reference.adapter", arch)
    made = attach(model, arch, found.peft, parallel, name=REFERENCE)
    found.load(made)
    for adapter in made:
        adapter.enabled = cfg.dpo.reference.mode != "adapter_off"
    return made


def cache_folder(cfg: Config) -> Path:
    """The folder of the log-probabilities' files. ~ is the home folder, as in data.cache_dir."""
    named = cfg.dpo.reference.cache_dir
    return Path(cfg.checkpointing.checkpoint_dir) / "reference" if named is None else Path(named).expanduser()


def attach_logps(
    cfg: Config, inputs: RunInputs, parallel: ParallelContext, total_steps: int
) -> tuple[RunInputs, list[str]]:
    """The inputs, whose loaders now include the reference's log-probabilities of every pair of the run, and a line of text
    for each data set. The numbers come from the files of `dpo.reference.cache_dir`; missing ones are computed and written
    there. The reference's model is freed at the end.

    Raises ConfigError on every rank if the folder can't be written. Collectives: a broadcast for each data set; if
    something is computed, also a broadcast for each write, and those of the model and of `compute_missing`.
    """
    folder = cache_folder(cfg)
    model = from_first_rank(parallel, lambda: _describe(cfg, inputs))
    reference: ResidentReference | None = None
    loaders = {}
    lines = []
    for key, loader in inputs.loaders.items():
        name, steps = ("train", total_steps) if key == TRAIN else (key, None)
        num_answers = int(loader.answers.max()) + 1
        numbered = "distinct" if num_answers < loader.answers.size else "two a pair"
        data = {"data": loader.dataset.fingerprint, "answers": numbered}
        cache = LogpsCache(folder / f"{name}-{_digest({**model, **data})}.safetensors")
        positions = positions_by_use(loader, steps)
        table = from_first_rank(parallel, partial(cache.read, num_answers))
        known = _known(table, loader.answers[positions])
        if known < len(positions):
            if reference is None:
                from_first_rank(parallel, partial(require_writable, folder, "dpo.reference.cache_dir"))
                reference = build_reference(cfg, inputs, parallel)
            keep = partial(_keep, cache, name, loader.answers[positions], parallel)
            table = compute_missing(reference, loader, positions, table, parallel, after_some=keep)
        loaders[key] = loader.with_reference_logps(table)
        lines.append(f"reference log-probabilities of {name}: {known} of {len(positions)} pairs from {cache.path}")
        broken = positions[~np.isfinite(table[loader.answers[positions]]).all(axis=1)]
        if len(broken):
            rows = ", ".join(str(row) for row in loader.dataset.rows[broken[:3]])
            lines.append(f"  not finite for {len(broken)} pairs of {name}, the first in rows {rows} (from 0)")
    if reference is not None:
        del reference
        gc.collect()  # layers have reference cycles, so their weights are freed only by the garbage collector
        if parallel.device.type == "cuda":
            torch.cuda.empty_cache()
    return dataclasses.replace(inputs, loaders=loaders), lines


def _describe(cfg: Config, inputs: RunInputs) -> dict[str, str]:
    """What the numbers depend on, besides the data. The layout is left out: it changes only the rounding."""
    fp8, adapter = cfg.policy.megatron_cfg.fp8_cfg, cfg.dpo.reference.adapter
    return {
        "format": str(FORMAT),
        "weights": weights_fingerprint(inputs.reference, every_tensor=True),
        "architecture": inputs.reference_arch.fingerprint,
        "precision": cfg.policy.precision,
        "fp8": f"{fp8.fp8} {fp8.fp8_recipe}" if fp8.enabled else "",
        **({} if cfg.dpo.ld_alpha is None else {"ld_alpha": str(cfg.dpo.ld_alpha)}),
        **({} if adapter is None else {"adapter": adapter_fingerprint(adapter)}),
    }


def _digest(description: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def _known(table: Table, answers: npt.NDArray[np.int64]) -> int:
    """How many of the pairs with these answers [pairs, 2] the table has both numbers of."""
    return int((~np.isnan(table[answers]).any(axis=1)).sum())


def _keep(
    cache: LogpsCache, name: str, answers: npt.NDArray[np.int64], parallel: ParallelContext, table: Table
) -> None:
    from_first_rank(parallel, partial(cache.write, table))
    if parallel.rank == 0:
        known = f"{_known(table, answers)} of {len(answers)} pairs"
        print(f"reference log-probabilities of {name}: {known}", flush=True)
