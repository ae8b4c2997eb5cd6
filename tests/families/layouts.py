"""The layouts in which test_equal.py holds each family to transformers."""

from __future__ import annotations

from typing import Any

from megadpo.config.architecture import Architecture

LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {},
    "TP2": {"tensor": 2},
    "TP2 with SP": {"tensor": 2, "sequence_parallel": True},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
    "EP2": {"expert": 2},
}


def takes_part(arch: Architecture, layout: dict[str, Any]) -> bool:
    """Experts need sequence parallelism where tensor parallelism is; dense models have nothing to share out; the states of
    linear attention need a whole text."""
    if arch.delta_net is not None and "context" in layout:
        return False
    if arch.experts is not None:
        return layout.get("tensor", 1) == 1 or layout.get("sequence_parallel", False)
    return "expert" not in layout
