"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.types import Proportion
from megadpo.config.variants import OPTIMIZERS

_OPT = "policy.megatron_cfg.optimizer"


@OPTIMIZERS.add("sgd")
@dataclass(frozen=True, kw_only=True)
class Sgd:
    """megatron-core's SGD."""

    sgd_momentum: Proportion = 0.9
    """Momentum of SGD."""

    @property
    def state_bytes(self) -> int:
        """Bytes of moments for each parameter."""
        return 4 * (self.sgd_momentum > 0)

    def settings(self) -> dict[str, Any]:
        """Fields of megatron-core's OptimizerConfig."""
        return {"sgd_momentum": self.sgd_momentum}

    def install(self, device_type: str) -> None:
        """Nothing to choose."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """What is wrong between this optimizer and the rest of the config."""
        if known.cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer:
            expected = f"false with {_OPT}.optimizer sgd: megatron-core shards Adam's state only"
            fix = f"set it to false, or {_OPT}.optimizer: adam"
            yield Problem(f"{_OPT}.use_distributed_optimizer", True, expected, fix)
