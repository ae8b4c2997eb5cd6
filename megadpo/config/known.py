"""What is known when a variant or a rule is asked for its problems: the config alone, or more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a variant may ask of the machine that a run is on."""

    device: Literal["cpu", "cuda"]
    compute_capability: tuple[int, int] | None = None
    """Of the GPU, e.g. (9, 0) for Hopper."""
    cuda_version: tuple[int, int] | None = None
    """That torch was built for."""
    why_missing: Callable[[str], str | None] = lambda name: None
    """Why a Python package such as transformer_engine, or MIXED_PRODUCTS, can't be used; None where it can."""


INSTALL = "install the 'gpu' extra (pip install megadpo[gpu], see docs/gpu.md)"
MIXED_PRODUCTS = "products of bfloat16 matrices in float32"
"""torch multiplies bfloat16 matrices into a float32 one, and adds to it, without rounding in between."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known when a variant or a rule is asked for problems. None: not known, and what depends on it is not judged."""

    cfg: Config
    arch: Architecture | None = None
    world_size: int | None = None
    """Processes of the run."""
    machine: Machine | None = None

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """Of the run. auto: not known."""
        return self.cfg.policy.device if self.machine is None else self.machine.device
