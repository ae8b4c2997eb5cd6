"""The schema of the config: one dataclass for each YAML section.

A key that NeMo RL has too has its name and default. Options of losses have TRL's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megadpo.config.interpolation import Environment
from megadpo.config.problems import Problem
from megadpo.config.schema_policy import PolicyConfig
from megadpo.config.types import CountOrZero, FitsPath, FloatOrZero, PathText, PositiveFloat, PositiveInt, Range, Seed
from megadpo.config.variants import FORMATS, LOGGERS, LOSSES, OneOf, OptionsOf


def user_cache_dir() -> str:
    """$XDG_CACHE_HOME/megadpo, or ~/.cache/megadpo; the ~ is not expanded."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "megadpo")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """`dpo.reference`: the frozen model that the policy is compared with."""

    mode: Literal["resident", "cached", "adapter_off", "none"] = "resident"
    """resident: a second model in memory, sharded like the policy. cached: its log-probabilities of every pair, computed
    before training and kept in a file (docs/reference.md). adapter_off: with LoRA, the policy without its adapters. none: no
    reference, for losses that read none (docs/losses.md) and for preference_loss_weight 0 (SFT). Left out or null, with LoRA
    and no model_name: adapter_off."""
    model_name: PathText | None = None
    """Hugging Face folder or hub name, or Megatron checkpoint folder. null: the policy's starting model."""
    adapter: PathText | None = None
    """Folder of a PEFT adapter for the reference, such as one from SFT with which peft.init_from starts the policy."""
    cache_dir: PathText | None = None
    """With mode cached: the folder of the log-probabilities. null: checkpointing.checkpoint_dir/reference."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """`dpo`: how long to train, when to validate, and the loss."""

    max_num_epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_num_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, also inside an epoch. null: after max_num_epochs."""
    val_period: CountOrZero = 25
    """Steps between validations; 0: no validation between the first and the last step."""
    val_batches: CountOrZero = 8
    """Global batches per validation set; 0 (or NeMo RL's -1): the whole set."""
    val_global_batch_size: PositiveInt = 8
    """Pairs per validation batch, over all data-parallel ranks; with plackett_luce rankings."""
    val_micro_batch_size: PositiveInt = 1
    """Pairs per micro-batch in validation when sequence packing is off."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    seed: Seed = 42
    """Seed of the data order and of every random number of the run."""

    reference_policy_kl_penalty: PositiveFloat = 0.05
    """Beta of the DPO loss: the higher, the closer the policy stays to the reference."""
    preference_average_log_probs: bool = False
    """Means of log-probabilities over an answer's tokens in the preference loss and the rewards, instead of sums."""
    sft_average_log_probs: bool = False
    """The same in the SFT loss. Left out or null: as preference_average_log_probs."""
    preference_loss_weight: FloatOrZero = 1.0
    """Coefficient of the preference loss."""
    sft_loss_weight: FloatOrZero = 0.0
    """Coefficient of the SFT loss on the chosen answer."""

    loss_type: Annotated[str, OneOf(LOSSES)] = "sigmoid"
    """The preference loss, by TRL's names; docs/losses.md has their formulas and sources. sigmoid is DPO's loss."""
    ld_alpha: Annotated[float, Range(ge=0, le=1)] | None = None
    """Length desensitisation: in the preference loss, tokens of an answer beyond the shorter answer's length have this
    weight. null: 1. Source: LD-DPO, Liu et al. 2024, https://arxiv.org/abs/2409.06411."""
    use_weighting: bool = False
    """Weight each pair's preference loss by how likely its two answers are for the policy, compared with what it would
    sample. Costs another projection onto the vocabulary. Source: WPO, Zhou et al. 2024, https://arxiv.org/abs/2406.11827."""
    loss_options: Annotated[Mapping[str, Any], OptionsOf(LOSSES)] = field(default_factory=LOSSES.defaults)
    """Options of the losses, by name; in a file they are keys of `dpo`."""
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    """With a NaN or infinite loss: stop and name the pairs of the batch, or skip the update and count it."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    @property
    def loss(self) -> Any:
        """The Loss of `loss_type` (megadpo/objective/losses.py) with its options."""
        return LOSSES.configured(self.loss_type, self.loss_options)

    @property
    def computes_preference_loss(self) -> bool:
        """With weight 0 too, to be logged, unless it needs a reference and there is none."""
        has_scores = self.reference.mode != "none" or not self.loss.reads_reference
        return has_scores or self.preference_loss_weight != 0

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the whole run, given the global batches in one pass over the data."""
        by_epochs = self.max_num_epochs * batches_per_epoch
        return by_epochs if self.max_num_steps is None else min(by_epochs, self.max_num_steps)


HOLDOUT = "holdout"
"""Name of the validation set of data.holdout."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """`data`."""

    train_data_path: Annotated[str, FitsPath()] | tuple[PathText, ...] | dict[str, PositiveFloat] = ""
    """Training pairs: a file (.jsonl, .json, .csv, these also .gz or .zst; .parquet, .arrow), a folder of such, or a
    dataset of the Hugging Face hub. Folders and hub names take `:subset` and `@split` behind them; without a split it
    is train. A list: the pairs of all of them. {path: weight}: every epoch has its share of each. May be empty for
    evaluation, and with a dataset_name that stands for a dataset of the hub."""
    val_data_paths: dict[str, PathText | tuple[PathText, ...]] | None = None
    """Validation sets, {name: a path as in train_data_path, or a list of them}. A single one is taken as {default: it}, and
    so is NeMo RL's val_data_path. null: no validation."""
    holdout: Annotated[float, Range(gt=0, lt=1)] | None = None
    """Share of the training prompts whose pairs are the validation set `holdout` instead of being trained on."""
    drop_last: bool = True
    """Pairs at the end of an epoch that don't fill a global batch. true: they are left out (with shuffle, other pairs in
    each epoch). false: they are a smaller global batch, whose loss is the mean over its pairs."""
    dataset_name: Annotated[str, OneOf(FORMATS)] | None = None
    """The format of the rows, by NeMo RL's names (docs/data.md shows each). null: the format of a source's first valid row.
    HelpSteer3 and Tulu3Preference without a train_data_path are read from the hub."""
    format_options: Annotated[Mapping[str, Any], OptionsOf(FORMATS)] = field(default_factory=FORMATS.defaults)
    """Options of the formats, by name (docs/data.md); in a file they are keys of `data`."""
    loss_on: Literal["last_turn", "differing_turns"] = "last_turn"
    """For an answer of several turns. last_turn: the assistant's last turn is in the loss, as in NeMo RL. differing_turns:
    every assistant turn that differs from the turn at the same place of the other answer."""
    on_bad_row: Literal["refuse", "drop"] = "refuse"
    """With a row that can't be used (a tie, equal answers, an empty answer, messages that the template refuses, ...): refuse
    the source and name the row, or leave it out and count it."""
    max_input_seq_length: PositiveInt = 1024
    """Most tokens in prompt + one answer. Left out or null: policy.max_total_sequence_length, and at most that."""
    shuffle: bool = True
    """true: a new order in each epoch, from dpo.seed and the epoch. false: file order."""
    group_prompts: bool = True
    """Put pairs with the same prompt into one pack where possible, and compute the prompt, each distinct answer, and what
    answers begin with in common once. false: each pair alone. Loss and gradients of a global batch are the same; which pairs
    are in it may differ, and then no run resumes with the other value. Needs policy.sequence_packing.share_prompt."""
    num_workers: CountOrZero = 1
    """0: batches are packed when they are needed. 1: ahead of time, in a background thread. A larger number is the same
    as 1."""
    on_too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """With a pair over the limit: refuse the file, drop the pair and count it, or truncate it and count it. The prompt is
    truncated first, at its left (BOS stays), then the answers at their right."""
    cache_dir: PathText | None = field(default_factory=user_cache_dir)
    """Folder for token ids, which are made once and mapped into memory; ~ is the home folder. Left out:
    $XDG_CACHE_HOME/megadpo or ~/.cache/megadpo. null: each process tokenises into its own memory."""
    num_tokenize_workers: PositiveInt | None = None
    """Processes that tokenise what is not in the cache. null: one for each CPU core this process may use. Files of a few
    thousand pairs are tokenised in one process anyway."""

    @property
    def train_paths(self) -> list[str]:
        """The paths of train_data_path."""
        return [self.train_data_path] if isinstance(self.train_data_path, str) else list(self.train_data_path)

    @property
    def train_shares(self) -> tuple[float, ...] | None:
        """The share (0..1) of each of train_paths; None without weights, or with one path."""
        if not isinstance(self.train_data_path, dict) or len(self.train_data_path) < 2:
            return None
        total = sum(self.train_data_path.values())
        return tuple(weight / total for weight in self.train_data_path.values())

    @property
    def val_names(self) -> list[str]:
        """The validation sets of a training run."""
        return [*(self.val_data_paths or {}), *([HOLDOUT] if self.holdout else [])]


@dataclass(frozen=True, kw_only=True)
class CheckpointingConfig:
    """`checkpointing`."""

    enabled: bool = True
    """false: nothing is saved, and nothing resumed."""
    checkpoint_dir: PathText = "results/dpo"
    """Folder of the checkpoints step_<N>/. A run that starts here again resumes from the newest complete one."""
    metric_name: str | None = None
    """Metric that ranks checkpoints: `validation-<name>_loss`, NeMo RL's `val:validation-<name>_loss`, `train:loss`.
    null: the newest are the best."""
    higher_is_better: bool = False
    """For metric_name: true for accuracies and margins, false for losses."""
    keep_top_k: PositiveInt | None = None
    """Keep this many best checkpoints, and the newest. null: all."""
    save_period: PositiveInt = 50
    """Steps between checkpoints. The last step is always saved."""
    on_damage: Literal["stop", "previous"] = "stop"
    """If the newest checkpoint is damaged: stop and name its damaged files, or rename it to step_<N>.damaged and resume from
    the newest undamaged one before it."""
    async_save: bool = False
    """Write a checkpoint's files during the next steps. The step that saves only copies the rank's state to host memory,
    which is kept for the next save. A stop and the end of the run wait for the files. NeMo RL's
    policy.megatron_cfg.checkpoint.async_save and checkpointing.is_async mean the same."""
    checkpoint_must_save_by: str | None = None
    """DD:HH:MM:SS after the start of the command (below torchrun: of the rank): save, then stop. null: no limit."""
    save_optimizer: bool = True
    """false: weights only, for an export or as another run's starting model. A run can't resume from them."""


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """`logger`. metrics.jsonl and the resolved config are always written to log_dir."""

    log_dir: PathText = "logs"
    """Folder of metrics.jsonl and config.yaml."""
    monitor_gpus: bool = False
    """Log utilisation, memory and power of the first node's GPUs at each step, with NVML (docs/metrics.md)."""
    loggers: Annotated[Mapping[str, Any], OptionsOf(LOGGERS)] = field(default_factory=LOGGERS.defaults)
    """`<name>_enabled` and `<name>` of every logger of megadpo/train/loggers."""

    @property
    def enabled(self) -> list[Any]:
        """The loggers that are switched on (megadpo/train/loggers), with their options."""
        return LOGGERS.enabled(self.loggers)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """`cluster`. torchrun decides the number of processes. If these keys are set, they must agree with it."""

    gpus_per_node: PositiveInt | None = None
    """Ranks per node. null: as torchrun says."""
    num_nodes: PositiveInt | None = None
    """Nodes. null: as torchrun says."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    policy: PolicyConfig
    dpo: DpoConfig = field(default_factory=DpoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plugins: tuple[PathText, ...] = ()
    """Python files or modules that add variants: losses, model families, formats, loggers, kernels. They are executed."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Not a YAML key: a line for each key that was accepted without effect, for rank 0 to print."""
    environment: Environment = field(default_factory=dict, compare=False, repr=False)
    """Not a YAML key: the values that contain environment variables (`${oc.env:NAME}`), and their text for files."""
    refused_with_experts: tuple[Problem, ...] = field(default=(), compare=False)
    """Not a YAML key: problems of the file for a model with experts only."""
