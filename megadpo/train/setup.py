"""From a checked config to everything a run needs, in the order that costs the user least time when something is wrong:
data first (seconds), then weights (minutes)."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megadpo.checkpoint import CheckpointInfo, TrainingPosition, load_training_state, load_weights, newest_checkpoint
from megadpo.config.architecture import Architecture, read_architecture
from megadpo.config.metric import parse_metric_name
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.data.dataset import PairDataset, load_datasets
from megadpo.data.loader import GlobalBatch, GlobalBatchLoader
from megadpo.data.tokenizer import load_tokenizer, pad_token_id
from megadpo.model.build import build_model
from megadpo.model.freeze import freeze
from megadpo.model.gpt import PairModel
from megadpo.model.source import ModelSource, resolve_source, tokenizer_source
from megadpo.model.weights.load import load_hf_weights, place_of
from megadpo.optimizer import build_optimizer, build_scheduler, wrap_for_training
from megadpo.parallel import ParallelContext
from megadpo.reference import ResidentReference
from megadpo.train.step import Trainer

if TYPE_CHECKING:
    pass


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
    data = load_data(cfg, arch, source, ranks_of(parallel))
    total_steps = cfg.dpo.total_steps(data.train_loader.batches_per_epoch)
    resume = find_resume(cfg, data)

    policy = build_model(arch, cfg.policy, parallel, frozen=False)
    freeze(policy, cfg.policy.freeze, arch)
    if resume is None:
        fill(policy, source, arch, parallel)
    wrapped = wrap_for_training(policy, cfg.policy)
    optimizer = build_optimizer(wrapped, cfg.policy, parallel.device)
    scheduler = build_scheduler(optimizer, cfg.policy, total_steps)
    trainer = Trainer(
        cfg.dpo,
        parallel,
        policy=wrapped,
        reference=build_reference(cfg, source, arch, parallel),
        optimizer=optimizer,
        scheduler=scheduler,
        log_balance_per_layer=cfg.policy.megatron_cfg.moe_per_layer_logging,
    )
    position = TrainingPosition(
        step=0, epoch=0, batch=0, data_fingerprint=data.train.fingerprint, data_settings=data_settings(cfg)
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
    return Run(cfg, parallel, source, data, trainer, position, total_steps)


def seed_everything(seed: int, parallel: ParallelContext) -> None:
    """One seed for Python, NumPy and torch; tensor-parallel regions differ by rank (megatron-core's tracker)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + 100 * parallel.pp_rank)
    model_parallel_cuda_manual_seed(seed)


def ranks_of(parallel: ParallelContext) -> dict[str, int]:
    """Which part of the data this rank gets, as GlobalBatchLoader takes it."""
    return {
        "dp_rank": parallel.dp_rank,
        "dp_size": parallel.dp_size,
        "cp_rank": parallel.cp_rank,
        "cp_size": parallel.cp_size,
    }


def load_data(cfg: Config, arch: Architecture, source: ModelSource, ranks: Mapping[str, int]) -> RunData:
    """Read, tokenise and deal out every data file of the config; ranks: `ranks_of`. Raises DataError with every problem
    of every file."""
    tokenizer = load_tokenizer(str(tokenizer_source(cfg, source)))
    paths = {"": cfg.data.train_data_path, **(cfg.data.val_data_paths or {})}
    datasets = load_datasets(cfg, paths, tokenizer, arch.vocab_size)
    train = datasets.pop("")
    ranks = {**ranks, "pad_token_id": pad_token_id(tokenizer)}
    train_loader = GlobalBatchLoader.from_config(train, cfg, arch, training=True, **ranks)
    loaders = {
        name: GlobalBatchLoader.from_config(data, cfg, arch, training=False, **ranks) for name, data in datasets.items()
    }
    reports = [str(data.report) for data in (train, *datasets.values())]
    if train_loader.dropped_pairs_per_epoch:
        reports.append(
            f"{train.report.path}: {train_loader.dropped_pairs_per_epoch} pairs an epoch don't fill a last global batch "
            f"of {cfg.policy.train_global_batch_size} and are left out"
        )
    return RunData(train, train_loader, loaders, reports)


def build_reference(
    cfg: Config, policy_source: ModelSource, arch: Architecture, parallel: ParallelContext
) -> ResidentReference | None:
    """The frozen reference of `dpo.reference`, loaded; None where the mode is 'none'."""
    if cfg.dpo.reference.mode == "none":
        return None
    source = policy_source
    if cfg.dpo.reference.model_name is not None:
        source = resolve_source(cfg.dpo.reference.model_name, "dpo.reference.model_name")
        arch = read_architecture(source.hf_files, "dpo.reference.model_name")
    model = build_model(arch, cfg.policy, parallel, frozen=True)
    fill(model, source, arch, parallel)
    return ResidentReference(model, parallel)


def fill(model: Sequence[PairModel], source: ModelSource, arch: Architecture, parallel: ParallelContext) -> None:
    """Load the weights that `source` names into the chunks of this rank."""
    if source.megatron is not None:
        load_weights(model, source.megatron)
    else:
        load_hf_weights(model, arch, source.hf_files, place_of(parallel))


def data_settings(cfg: Config) -> dict[str, object]:
    """What, beside the pairs themselves, must stay as it was: it decides which pairs a step sees, and which weights the
    optimizer holds."""
    return {
        "dpo.seed": cfg.dpo.seed,
        "data.shuffle": cfg.data.shuffle,
        "policy.train_global_batch_size": cfg.policy.train_global_batch_size,
        "policy.freeze": list(cfg.policy.freeze),
        "policy.megatron_cfg.freeze_moe_router": cfg.policy.megatron_cfg.freeze_moe_router,
    }


def find_resume(cfg: Config, data: RunData) -> CheckpointInfo | None:
    """The checkpoint to go on from, or None. Raises ConfigError where it saw other data, or saw it in another order."""
    if not cfg.checkpointing.enabled:
        return None
    require_writable(Path(cfg.checkpointing.checkpoint_dir), "checkpointing.checkpoint_dir")
    info = newest_checkpoint(Path(cfg.checkpointing.checkpoint_dir))
    if info is None:
        return None
    fix = f"restore what {info.path} was trained with, or start anew in another checkpointing.checkpoint_dir"
    problems = []
    if info.position.data_fingerprint != data.train.fingerprint:
        expected = f"the pairs and tokenisation that {info.path} was trained on"
        problems.append(Problem("data.train_data_path", data.train.report.path, expected, fix))
    now = data_settings(cfg)
    for field, before in info.position.data_settings.items():
        if now[field] != before:
            problems.append(Problem(field, now[field], f"{before}, as in {info.path}", fix))
    if problems:
        raise ConfigError(problems)
    return info


def require_writable(folder: Path, field: str) -> None:
    """Make `folder` and write a file there, so that hours of training don't end at the first save."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        fix = "choose another folder, or make room and set its permissions"
        raise ConfigError([Problem(field, str(folder), f"a folder that can be written ({error})", fix)]) from error


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
