"""Checkpoints in megatron-core's distributed format: complete or absent, resumable in the same or another layout."""

from megadpo.checkpoint.folder import (
    CheckpointInfo,
    TrainingPosition,
    complete_checkpoints,
    delete_unfinished,
    finish_deletions,
    prune_checkpoints,
    unfinished_bytes,
)
from megadpo.checkpoint.load import load_training_state, load_weights
from megadpo.checkpoint.save import Save, begin_save
from megadpo.checkpoint.verify import damages_together

__all__ = [
    "CheckpointInfo",
    "Save",
    "TrainingPosition",
    "begin_save",
    "complete_checkpoints",
    "damages_together",
    "delete_unfinished",
    "finish_deletions",
    "load_training_state",
    "load_weights",
    "prune_checkpoints",
    "unfinished_bytes",
]
