"""The frozen reference: a sharded copy of a model, the policy without its adapters, or a file of log-probabilities."""

from megadpo.reference.cached import LogpsCache, compute_missing, positions_by_use
from megadpo.reference.resident import ResidentReference, SwitchedReference, answer_logps, weighted_logps

__all__ = [
    "LogpsCache",
    "ResidentReference",
    "SwitchedReference",
    "answer_logps",
    "compute_missing",
    "positions_by_use",
    "weighted_logps",
]
