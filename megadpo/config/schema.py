"""The whole config: one dataclass per YAML section, attribute access as in YAML."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

from megadpo.config.schema_dpo import DpoConfig
from megadpo.config.schema_policy import PolicyConfig
from megadpo.config.types import CountOrZero, PositiveInt, Text
from megadpo.config.variants import FORMATS, OneOf


def user_cache_dir() -> str:
    """$XDG_CACHE_HOME/megadpo, or ~/.cache/megadpo with the ~ still in it."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "megadpo")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data`."""

    train_data_path: str = ""
    """Training pairs: a file (.jsonl, .json, .csv, these also .gz or .zst; .parquet, .arrow), a folder of such, or a
    dataset of the Hugging Face hub. Folders and hub names take `:subset` and `@split` behind them; without a split it
    is train. Empty only where nothing is trained, or with a dataset_name that is a hub dataset's."""
    val_data_paths: dict[str, Text] | None = None
    """Validation sets, {name: as train_data_path}. A single one is taken as {default: it}. null: no validation."""
    dataset_name: Annotated[str, OneOf(FORMATS)] | None = None
    """The format of the rows, by NeMo RL's names (docs/data.md shows each). null: that of a source's first good row.
    HelpSteer3 and Tulu3Preference without a train_data_path are read from the hub."""
    prompt_key: Text = "prompt"
    """What the rows call the prompt, in BinaryPreferenceDataset."""
    chosen_key: Text = "chosen"
    """And the chosen answer; in Tulu3Preference and ImplicitPrompt too."""
    rejected_key: Text = "rejected"
    """And the rejected one."""
    loss_on: Literal["last_turn", "differing_turns"] = "last_turn"
    """Where an answer has several turns: the loss is on the assistant's last one (as in NeMo RL), or on each of the
    assistant's turns that the other answer has not got at the same place."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """A row that can't be used (a tie, equal answers, an empty answer, messages that the template refuses, ...): refuse
    the source and name it, or leave it out and count it."""
    max_input_seq_length: PositiveInt = 1024
    """Most tokens in prompt + one answer. Left out or null: policy.max_total_sequence_length, and at most that."""
    shuffle: bool = True
    """A new order each epoch, decided by dpo.seed and the epoch. false: file order."""
    num_workers: CountOrZero = 1
    """0: batches are packed when they are asked for. 1: ahead of time, in a background thread. More change nothing."""
    on_too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """A pair longer than the limit: refuse the file, drop the pair and count it, or cut it and count it: the prompt from the
    left (BOS stays), and only then the answers from the right."""
    cache_dir: Text | None = field(default_factory=user_cache_dir)
    """Folder for token ids, made once and then mapped into memory; ~ is the home folder. Left out:
    $XDG_CACHE_HOME/megadpo or ~/.cache/megadpo. null: every process tokenises for itself, into its own memory."""
    num_tokenize_workers: PositiveInt | None = None
    """Processes that tokenise what is not in the cache. null: one for each CPU core this process may use. Files of a few
    thousand pairs are tokenised in one process anyway."""


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig:
    """`checkpointing`."""

    enabled: bool = True
    """false: nothing is saved, and nothing resumed."""
    checkpoint_dir: Text = "results/dpo"
    """Holds step_<N>/ folders. A run started again here resumes from the newest complete one."""
    metric_name: str | None = None
    """What makes a checkpoint good: `validation-<name>_loss`, NeMo RL's `val:validation-<name>_loss`, `train:loss`.
    null: the newest are the best."""
    higher_is_better: bool = False
    """Of metric_name: true for accuracies and margins, false for losses."""
    keep_top_k: PositiveInt | None = None
    """Best checkpoints to keep, the newest always among the kept. null: all."""
    save_period: PositiveInt = 50
    """Save every this many steps, and at the end."""
    checkpoint_must_save_by: str | None = None
    """DD:HH:MM:SS after the start: save, then stop. null: no limit."""
    save_optimizer: bool = True
    """false: weights only, to export or to start another run from; no run resumes from them."""


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """`logger.wandb`."""

    project: Text | None = None
    """null: wandb's own default."""
    name: Text | None = None
    """Of the run. null: wandb makes one up."""
    entity: Text | None = None
    """User or team. null: the logged-in user's default."""
    mode: Literal["online", "offline"] | None = None
    """null: what the environment variable WANDB_MODE says."""


@dataclass(frozen=True, kw_only=True)
class TensorboardConfig:
    """`logger.tensorboard`."""

    log_dir: Text | None = None
    """Folder of the event files, relative to logger.log_dir. null: tensorboard."""


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """`logger`. metrics.jsonl and the resolved config are always written to log_dir."""

    log_dir: Text = "logs"
    """Folder of metrics.jsonl and config.yaml."""
    wandb_enabled: bool = False
    """Log to Weights & Biases as well, by logger.wandb."""
    tensorboard_enabled: bool = False
    """Write TensorBoard's event files as well."""
    mlflow_enabled: bool = False
    """Only false."""
    swanlab_enabled: bool = False
    """Only false."""
    monitor_gpus: bool = False
    """Only false."""
    num_val_samples_to_print: CountOrZero = 0
    """Only 0."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: TensorboardConfig = field(default_factory=TensorboardConfig)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """`cluster`. torchrun decides the world; these, where set, must agree with it."""

    gpus_per_node: PositiveInt | None = None
    """null: as many ranks a node as torchrun starts."""
    num_nodes: PositiveInt | None = None
    """null: as many nodes as torchrun joins."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    policy: PolicyConfig
    dpo: DpoConfig = field(default_factory=DpoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plugins: tuple[Text, ...] = ()
    """Python files or modules that add variants: losses, model families, formats, loggers, kernels. They are executed."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Not a YAML key: what the loader accepted although it has no effect here, one line each, for rank 0 to print."""
