"""The frozen reference: a sharded copy beside the policy, or its log-probabilities, computed once and kept in a file."""

from megadpo.reference.cached import LogpsCache, compute_missing, positions_by_use
from megadpo.reference.resident import ResidentReference, answer_logps

__all__ = ["LogpsCache", "ResidentReference", "answer_logps", "compute_missing", "positions_by_use"]
