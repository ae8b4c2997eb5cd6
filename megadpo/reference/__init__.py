"""The frozen reference: a sharded copy of a model, or a file of its log-probabilities."""

from megadpo.reference.cached import LogpsCache, compute_missing, positions_by_use
from megadpo.reference.resident import ResidentReference, answer_logps, weighted_logps

__all__ = [
    "LogpsCache",
    "ResidentReference",
    "answer_logps",
    "compute_missing",
    "positions_by_use",
    "weighted_logps",
]
