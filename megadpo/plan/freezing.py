"""How much of a model `policy.freeze` leaves to train."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from megadpo.config.architecture import Architecture


def trainable_share(arch: Architecture, patterns: Sequence[str]) -> float:
    """Share (0..1) of the weights that get gradients, for patterns that `freeze_problems` has found nothing against."""
    if not patterns:
        return 1.0
    from megadpo.families import weight_table
    from megadpo.model.freeze import expand  # torch

    shapes = weight_table(arch).hf_shapes
    plain = [one for pattern in patterns for one in expand(pattern)]
    frozen = sum(math.prod(shape) for name, shape in shapes.items() if any(fnmatchcase(name, one) for one in plain))
    return 1 - frozen / sum(math.prod(shape) for shape in shapes.values())
