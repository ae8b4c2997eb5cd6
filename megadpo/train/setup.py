"""From a checked config to everything a run needs, in the order that costs the user least time when something is wrong:
data first (seconds), then weights (minutes)."""

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
from megadpo.config.architecture import Architecture
from megadpo.config.metric import parse_metric_name
from megadpo.config.problems import DataError, Problem
from megadpo.config.schema import Config
from megadpo.data.batches.loader import DataRank, GlobalBatch, GlobalBatchLoader
from megadpo.data.pairs import PairDataset
from megadpo.data.tokens.dataset import load_datasets
from megadpo.data.tokens.tokenizer import load_tokenizer, pad_token_id
from megadpo.families import read_architecture
from megadpo.model.build import build_model
from megadpo.model.freeze import freeze
from megadpo.model.source import ModelSource, resolve_source, tokenizer_source
from megadpo.optimizer.build import build_optimizer, build_scheduler, wrap_for_training
from megadpo.parallel import ParallelContext
from megadpo.train.reference import attach_logps, build_reference, require_reference_vocabulary
from megadpo.train.resume import changes, claim, data_settings, find_resume
from megadpo.train.step import Trainer


@dataclass(frozen=True)
class RunData:
    """The pairs of a run and the loaders over them."""

    train: PairDataset
    train_loader: GlobalBatchLoader
    validation: Mapping[str, GlobalBatchLoader]
    reports: list[str]
    """One line a file: what was read, dropped, truncated."""


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    cfg: Config
    parallel: ParallelContext
    source: ModelSource
    data: RunData
    trainer: Trainer
    position: TrainingPosition
    """Where to go on: zeros for a new run."""
    total_steps: int
    notes: list[str]
    """One line for each thing to know about a cached reference and a resume."""
    owner: str | None
    """What `claim` gave the rank that saves."""

    @property
    def ranking_metric(self) -> str | None:
        """Logged name of the metric that `keep_top_k` ranks checkpoints by, or None."""
        name = self.cfg.checkpointing.metric_name
        return None if name is None else parse_metric_name(name, list(self.data.validation)).key

    def validation_batches(self, name: str) -> Iterator[GlobalBatch]:
        """The global batches of one validation set, in file order, at most `dpo.val_batches` of them."""
        return self.data.validation[name].batches(epoch=0)


def prepare(cfg: Config, parallel: ParallelContext) -> Run:
    """Build the run on this rank. Raises UserError subclasses for everything a user can put right."""
    seed_everything(cfg.dpo.seed, parallel)
    source = resolve_source(cfg.policy.model_name, "policy.model_name")
    arch = read_architecture(source.hf_files)
    data = load_data(cfg, arch, source, data_rank(parallel))
    total_steps = cfg.dpo.total_steps(data.train_loader.batches_per_epoch)
    settings = data_settings(cfg, source, parallel)
    resume, notes = find_resume(cfg, data.train, settings, parallel)

    reference = None
    if cfg.dpo.reference.mode == "cached":  # before there is a policy, so that the two never share the memory
        loader, validation, cached = attach_logps(
            cfg, source, arch, parallel, data.train_loader, data.validation, total_steps
        )
        data = dataclasses.replace(data, train_loader=loader, validation=validation)
        notes += cached
    elif cfg.dpo.reference.mode == "resident":
        reference = build_reference(cfg, source, arch, parallel)

    policy = build_model(arch, cfg.policy, parallel, frozen=False)
    freeze(policy, cfg.policy.freeze, arch)
    if resume is None:
        load_weights(policy, source, arch, parallel)
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
    position = TrainingPosition(
        step=0, epoch=0, batch=0, data_fingerprint=data.train.fingerprint, data_settings=settings
    )
    if resume is not None:
        load_training_state(
            resume,
            parallel,
            model=policy,
            optimizer=optimizer,
            scheduler=scheduler,
            some_frozen=bool(cfg.policy.freeze),
        )
        position = resume.position
    notes += [] if resume is None else changes(cfg, resume)
    saves = cfg.checkpointing.enabled and parallel.rank == 0
    owner = claim(Path(cfg.checkpointing.checkpoint_dir)) if saves else None
    return Run(cfg, parallel, source, data, trainer, position, total_steps, notes, owner)


def seed_everything(seed: int, parallel: ParallelContext) -> None:
    """One seed for Python, NumPy and torch; tensor-parallel regions differ by rank (megatron-core's tracker)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100 * parallel.pp_rank)
    model_parallel_cuda_manual_seed(seed)


def data_rank(parallel: ParallelContext) -> DataRank:
    """Which part of the data this rank gets."""
    return DataRank(
        dp_rank=parallel.dp_rank, dp_size=parallel.dp_size, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size
    )


def load_data(cfg: Config, arch: Architecture, source: ModelSource, rank: DataRank) -> RunData:
    """Read, tokenise and deal out every data file of the config, to `rank` its part. Raises DataError with every problem
    of every file."""
    tokenizer = load_tokenizer(str(tokenizer_source(cfg, source)))
    paths = {"": cfg.data.train_data_path, **(cfg.data.val_data_paths or {})}
    datasets = load_datasets(cfg, paths, tokenizer, arch.vocab_size)
    require_reference_vocabulary(cfg, source, datasets.values())
    pad = pad_token_id(tokenizer)
    loaders: dict[str, GlobalBatchLoader] = {}
    problems: list[Problem] = []
    for name, data in datasets.items():
        try:
            loaders[name] = GlobalBatchLoader.from_config(
                data, cfg, arch, pad_token_id=pad, training=name == "", rank=rank
            )
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    train, train_loader = datasets[""], loaders.pop("")
    reports = [str(data.report) for data in datasets.values()]
    if train_loader.dropped_pairs_per_epoch:
        reports.append(
            f"{train.report.path}: {train_loader.dropped_pairs_per_epoch} pairs an epoch don't fill a last global batch "
            f"of {cfg.policy.train_global_batch_size} and are left out"
        )
    return RunData(train, train_loader, loaders, reports)


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
