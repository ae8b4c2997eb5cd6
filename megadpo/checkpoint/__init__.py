"""Checkpoints in megatron-core's distributed format: complete or absent, resumable in the same or another layout."""

from megadpo.checkpoint.folder import CheckpointInfo, complete_checkpoints, newest_checkpoint, prune_checkpoints
from megadpo.checkpoint.load import load_training_state, load_weights
from megadpo.checkpoint.position import TrainingPosition
from megadpo.checkpoint.save import save_checkpoint

__all__ = [
    "CheckpointInfo",
    "TrainingPosition",
    "complete_checkpoints",
    "load_training_state",
    "load_weights",
    "newest_checkpoint",
    "prune_checkpoints",
    "save_checkpoint",
]
