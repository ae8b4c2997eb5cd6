"""Where a run stands, apart from tensors: what resuming needs to go on with the very next batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TrainingPosition:
    """Counts are of completed work; the next batch is number `batch` of epoch `epoch`, both from 0."""

    step: int
    epoch: int
    batch: int
    skipped_steps: int = 0
    data_fingerprint: str = ""
    """Of the training pairs as tokenised; a resume on other data is refused."""
    data_settings: dict[str, Any] = field(default_factory=dict)
    """What else a resumed run must not change: seed, shuffle, global batch size, frozen weights."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of this very step, by their logged names; validation among them where it ran after this step."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
