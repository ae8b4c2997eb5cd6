"""Checkpoints in megatron-core's distributed format: complete or absent, resumable in the same or another layout."""

from megadpo.checkpoint.folder import CheckpointInfo, TrainingPosition, complete_checkpoints, prune_checkpoints
from megadpo.checkpoint.load import load_training_state, load_weights
from megadpo.checkpoint.save import save_checkpoint
from megadpo.checkpoint.verify import damages_together

__all__ = [
    "CheckpointInfo",
    "TrainingPosition",
    "complete_checkpoints",
    "damages_together",
    "load_training_state",
    "load_weights",
    "prune_checkpoints",
    "save_checkpoint",
]
