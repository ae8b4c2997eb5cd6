"""From a checked config to everything a run needs. Data comes first (seconds), then weights (minutes), so that a user hears
early of what is wrong."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megadpo.checkpoint import TrainingPosition, load_training_state, load_weights
from megadpo.config.metric import parse_metric_name
from megadpo.config.schema import Config
from megadpo.data.batches.loader import GlobalBatch
from megadpo.model.build import build_model
from megadpo.model.freeze import freeze
from megadpo.optimizer.build import build_optimizer, build_scheduler, wrap_for_training
from megadpo.parallel import ParallelContext
from megadpo.train.handed_on import own_files
from megadpo.train.inputs import RunInputs, open_run_inputs
from megadpo.train.reference import attach_logps, build_reference
from megadpo.train.resume import changes, claim, data_settings, find_resume
from megadpo.train.step import Trainer


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    cfg: Config
    parallel: ParallelContext
    inputs: RunInputs
    trainer: Trainer
    position: TrainingPosition
    """Where to go on: zeros for a new run."""
    total_steps: int
    notes: list[str]
    """One line for each thing to know about a cached reference and a resume."""
    owner: str | None
    """What `claim` gave the rank that saves."""
    own_files: Mapping[str, bytes]
    """Of the rank that saves: what its checkpoints hold instead of the starting model's files, but for the card."""

    @property
    def ranking_metric(self) -> str | None:
        """Logged name of the metric that `keep_top_k` ranks checkpoints by, or None."""
        name = self.cfg.checkpointing.metric_name
        return None if name is None else parse_metric_name(name, list(self.inputs.validation)).key

    def validation_batches(self, name: str) -> Iterator[GlobalBatch]:
        """The global batches of one validation set, in file order, at most `dpo.val_batches` of them."""
        return self.inputs.validation[name].batches(epoch=0)


def prepare(cfg: Config, parallel: ParallelContext) -> Run:
    """Build the run on this rank. Raises UserError subclasses for everything a user can put right."""
    seed_everything(cfg.dpo.seed, parallel)
    inputs = open_run_inputs(cfg, parallel.grid)
    pairs, arch = inputs.train_loader.dataset, inputs.arch
    total_steps = cfg.dpo.total_steps(inputs.train_loader.batches_per_epoch)
    settings = data_settings(cfg, inputs.reference, parallel)
    resume, notes = find_resume(cfg, pairs, settings, parallel)

    reference = None
    if cfg.dpo.reference.mode == "cached":  # before there is a policy, so that the two never share the memory
        inputs, lines = attach_logps(cfg, inputs, parallel, total_steps)
        notes += lines
    elif cfg.dpo.reference.mode == "resident":
        reference = build_reference(cfg, inputs, parallel)

    policy = build_model(arch, cfg.policy, parallel, frozen=False)
    freeze(policy, cfg.policy.freeze, arch)
    if resume is None:
        load_weights(policy, inputs.source, arch, parallel)
    wrapped = wrap_for_training(policy, cfg.policy)
    optimizer = build_optimizer(wrapped, cfg.policy, parallel.device)
    scheduler = build_scheduler(optimizer, cfg.policy, total_steps)
    trainer = Trainer(
        cfg.dpo,
        parallel,
        policy=wrapped,
        reference=reference,
        optimizer=optimizer,
        scheduler=scheduler,
        log_balance_per_layer=cfg.policy.megatron_cfg.moe_per_layer_logging,
    )
    position = TrainingPosition(step=0, epoch=0, batch=0, data_fingerprint=pairs.fingerprint, data_settings=settings)
    if resume is not None:
        load_training_state(
            resume,
            parallel,
            model=policy,
            optimizer=optimizer,
            scheduler=scheduler,
        )
        position = resume.position
    notes += [] if resume is None else changes(cfg, resume)
    saves = cfg.checkpointing.enabled and parallel.rank == 0
    owner = claim(Path(cfg.checkpointing.checkpoint_dir)) if saves else None
    files = own_files(cfg, inputs.source.hf_files, inputs.tokenizer) if saves else {}
    return Run(cfg, parallel, inputs, trainer, position, total_steps, notes, owner, files)


def seed_everything(seed: int, parallel: ParallelContext) -> None:
    """One seed for Python, NumPy and torch; tensor-parallel regions differ by rank (megatron-core's tracker)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100 * parallel.grid.pp_rank)
    model_parallel_cuda_manual_seed(seed)


def position_after(position: TrainingPosition, *, batches_per_epoch: int, skipped: bool) -> TrainingPosition:
    """The position once one more step is done."""
    batch = position.batch + 1
    return dataclasses.replace(
        position,
        step=position.step + 1,
        epoch=position.epoch + (batch == batches_per_epoch),
        batch=batch % batches_per_epoch,
        skipped_steps=position.skipped_steps + skipped,
    )
