"""Losses and metrics on log-probabilities of pairs: pure torch on [P] tensors, no collectives, no model."""

from megadpo.objective.dpo import LossOutput, dpo_loss, metric_names
from megadpo.objective.losses import LOSSES, PairLoss, PairScores

__all__ = ["LOSSES", "LossOutput", "PairLoss", "PairScores", "dpo_loss", "metric_names"]
