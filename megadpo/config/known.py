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
    why_missing: Callable[[str], str | None] = lambda package: None
    """Why a Python package such as transformer_engine can't be used; None where it can."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known when a variant or a rule is asked for problems. None: not known, and what depends on it is not judged."""

    cfg: Config
    arch: Architecture | None = None
    world_size: int | None = None
    """Processes of the run."""
    machine: Machine | None = None
