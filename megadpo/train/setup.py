"""Builds everything a run needs from a checked config. First the data (seconds), then the weights (minutes), so that users
see errors early."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megadpo.checkpoint import TrainingPosition, finish_deletions, load_training_state
from megadpo.config.metric import parse_metric_name
from megadpo.config.schema import Config
from megadpo.data.batches.loader import GlobalBatch
from megadpo.optimizer.build import build_optimizer, build_scheduler, wrap_for_training
from megadpo.parallel import ParallelContext
from megadpo.train.agreement import open_together
from megadpo.train.disk_space import require_space
from megadpo.train.handed_on import own_files
from megadpo.train.inputs import RunInputs
from megadpo.train.policy import build_policy
from megadpo.train.reference import attach_logps
from megadpo.train.resume import changes, claim, data_settings, find_resume, require_optimizer
from megadpo.train.step import Trainer
from megadpo.train.watch import MachineWatch


@dataclass(frozen=True)
class Run:
    """Everything the training loop needs."""

    cfg: Config
    parallel: ParallelContext
    inputs: RunInputs
    trainer: Trainer
    position: TrainingPosition
    """Where training starts: zeros for a new run."""
    total_steps: int
    notes: list[str]
    """Lines for the user about a cached reference and a resume."""
    owner: str | None
    """The result of `claim`, on the rank that saves."""
    watch: MachineWatch
    own_files: Mapping[str, bytes]
    """On the rank that saves: files of a checkpoint that replace those of the starting model, without the card."""

    @property
    def ranking_metric(self) -> str | None:
        """The logged name of the metric by which `keep_top_k` ranks checkpoints, or None."""
        name = self.cfg.checkpointing.metric_name
        return None if name is None else parse_metric_name(name, list(self.inputs.validation)).key

    def validation_batches(self, name: str) -> Iterator[GlobalBatch]:
        """At most `dpo.val_batches` global batches of one validation set, in file order."""
        return self.inputs.validation[name].batches(epoch=0)


class RunFinished(Exception):
    """The newest checkpoint is that of the run's last step, or of a later one. notes: as those of a Run."""

    def __init__(self, step: int, notes: list[str]) -> None:
        super().__init__(f"finished before, with step {step}")
        self.step = step
        self.notes = notes


def prepare(cfg: Config, parallel: ParallelContext) -> Run:
    """Builds the run on this rank. Raises UserError for everything that a user can correct."""
    saves = cfg.checkpointing.enabled and parallel.rank == 0
    if saves:
        finish_deletions(Path(cfg.checkpointing.checkpoint_dir))
    seed_everything(cfg.dpo.seed, parallel)
    inputs = open_together(cfg, parallel)
    pairs = inputs.train_loader.dataset
    total_steps = cfg.dpo.total_steps(inputs.train_loader.batches_per_epoch)
    settings = data_settings(cfg, inputs, parallel)
    resume, notes = find_resume(cfg, pairs, settings, parallel)
    if resume is not None and resume.position.step >= total_steps:
        raise RunFinished(resume.position.step, [*notes, *changes(cfg, resume)])
    if resume is not None:
        require_optimizer(resume)
    step = 0 if resume is None else resume.position.step
    notes += require_space(cfg, inputs.arch, parallel, step=step, total_steps=total_steps)

    if cfg.dpo.reference.mode == "cached":  # before the policy is built, so that only one model is in memory
        inputs, lines = attach_logps(cfg, inputs, parallel, total_steps)
        notes += lines
    policy, reference = build_policy(cfg, inputs, parallel, resumes=resume is not None)
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
            lora=cfg.policy.megatron_cfg.peft.enabled,
        )
        position = resume.position
    notes += [] if resume is None else changes(cfg, resume)
    owner = claim(Path(cfg.checkpointing.checkpoint_dir)) if saves else None
    files = own_files(cfg, inputs.source.hf_files, inputs.tokenizer) if saves else {}
    watch = MachineWatch(parallel, monitor_gpus=cfg.logger.monitor_gpus)
    return Run(cfg, parallel, inputs, trainer, position, total_steps, notes, owner, watch, files)


def seed_everything(seed: int, parallel: ParallelContext) -> None:
    """Seeds Python, NumPy and torch. megatron-core's tracker gives tensor-parallel ranks different seeds."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100 * parallel.grid.pp_rank)
    model_parallel_cuda_manual_seed(seed)


def position_after(position: TrainingPosition, *, batches_per_epoch: int, skipped: bool) -> TrainingPosition:
    """The position after one more step."""
    batch = position.batch + 1
    return dataclasses.replace(
        position,
        step=position.step + 1,
        epoch=position.epoch + (batch == batches_per_epoch),
        batch=batch % batches_per_epoch,
        skipped_steps=position.skipped_steps + skipped,
    )
