"""The `dpo:` section. Names and defaults are NeMo RL's; the losses' are TRL's; on_nonfinite_loss and reference are our own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megadpo.config.losses import LOSS_TRAITS, LossTraits, LossType
from megadpo.config.types import CountOrZero, FloatOrZero, PositiveFloat, PositiveInt, Range, Seed, Text


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

    loss_type: LossType = "sigmoid"
    """The preference loss, by TRL's names: docs/losses.md has each one's formula and source. sigmoid is DPO's."""
    label_smoothing: Annotated[float, Range(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be labelled the wrong way round, in sigmoid (conservative DPO), robust, exo_pair and cpo."""
    simpo_gamma: FloatOrZero = 0.5
    """Margin that simpo aims at, in units of beta x mean log-probability."""
    discopop_tau: Annotated[float, Range(gt=0, le=1)] = 0.05
    """Temperature at which discopop goes from one of its parts to the other."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """What keeps the policy near the reference in sigmoid, hinge, ipo, exo_pair, robust and discopop. reverse_kl: DPO's."""
    f_alpha_divergence_coef: float = 0.5
    """With alpha_divergence: the coefficient a of ((pi / pi_ref)^(a - 1) - 1) / (a - 1); not 1, which is reverse_kl."""
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss: stop and name the pairs of the batch, or skip the update and count it."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    @property
    def loss_traits(self) -> LossTraits:
        """What `loss_type` reads."""
        return LOSS_TRAITS[self.loss_type]

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the whole run, given the global batches in one pass over the data."""
        by_epochs = self.max_num_epochs * batches_per_epoch
        return by_epochs if self.max_num_steps is None else min(by_epochs, self.max_num_steps)
