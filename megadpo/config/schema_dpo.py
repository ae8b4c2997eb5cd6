"""The `dpo:` section. Names and defaults are NeMo RL's; the losses' are TRL's; on_nonfinite_loss and reference are our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megadpo.config.types import CountOrZero, FloatOrZero, PositiveFloat, PositiveInt, Seed, Text
from megadpo.config.variants import LOSSES, OneOf, OptionsOf


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """`dpo.reference`: the frozen model that the policy is compared with."""

    mode: Literal["resident", "cached", "none"] = "resident"
    """resident: a sharded copy beside the policy. cached: its log-probabilities of every pair, computed before training
    and kept in a file (docs/reference.md). none: no reference at all, for losses that
    read none (cpo, simpo, orpo) and for preference_loss_weight 0 (SFT)."""
    model_name: Text | None = None
    """Hugging Face folder or hub name, or Megatron checkpoint folder. null: what the policy started from."""
    cache_dir: Text | None = None
    """With mode cached: the folder of the log-probabilities. null: checkpointing.checkpoint_dir/reference."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """`dpo`: how long to train, when to validate, and the loss."""

    max_num_epochs: PositiveInt = 1
    """Passes over the training pairs."""
    max_num_steps: PositiveInt | None = None
    """Stop after this many optimizer steps even inside an epoch. null: the epochs decide."""
    val_period: CountOrZero = 25
    """Validate every this many steps; 0: never on the way."""
    val_batches: CountOrZero = 8
    """Global batches per validation set; 0 (or NeMo RL's -1): the whole set."""
    val_global_batch_size: PositiveInt = 8
    """Pairs per validation batch, over all data-parallel ranks."""
    val_micro_batch_size: PositiveInt = 1
    """Pairs per micro-batch in validation when sequence packing is off."""
    val_at_start: bool = True
    """Validate before the first step."""
    val_at_end: bool = False
    """Validate after the last step."""
    seed: Seed = 42
    """Seed of the data order and of every random number of the run."""

    reference_policy_kl_penalty: PositiveFloat = 0.05
    """Beta of the DPO loss: the weight of staying near the reference."""
    preference_average_log_probs: bool = False
    """Means of log-probabilities over an answer's tokens in the preference loss and the rewards, instead of sums."""
    sft_average_log_probs: bool = False
    """The same in the SFT loss. Left out or null: as preference_average_log_probs."""
    preference_loss_weight: FloatOrZero = 1.0
    """Coefficient of the preference loss."""
    sft_loss_weight: FloatOrZero = 0.0
    """Coefficient of the SFT loss on the chosen answer."""

    loss_type: Annotated[str, OneOf(LOSSES)] = "sigmoid"
    """The preference loss, by TRL's names: docs/losses.md has each one's formula and source. sigmoid is DPO's."""
    loss_options: Annotated[Mapping[str, Any], OptionsOf(LOSSES)] = field(default_factory=LOSSES.defaults)
    """What some losses read, by name; in a file they are keys of `dpo`."""
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss: stop and name the pairs of the batch, or skip the update and count it."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    @property
    def loss(self) -> Any:
        """The Loss of `loss_type` (megadpo/objective/losses.py) with its options."""
        return LOSSES.configured(self.loss_type, self.loss_options)

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the whole run, given the global batches in one pass over the data."""
        by_epochs = self.max_num_epochs * batches_per_epoch
        return by_epochs if self.max_num_steps is None else min(by_epochs, self.max_num_steps)
