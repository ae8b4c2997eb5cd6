"""How one rollout fails for good."""

from __future__ import annotations


class RolloutFailure(Exception):
    """One rollout could not be had. The collection goes on; the reason is written aside."""

    def __init__(self, kind: str, reason: str, *, status: int | None = None, attempts: int = 1) -> None:
        super().__init__(reason)
        self.kind = kind
        """`request`: the model's server; `reward`: the reward."""
        self.reason = reason
        self.status = status
        """HTTP status, where there was an answer."""
        self.attempts = attempts
