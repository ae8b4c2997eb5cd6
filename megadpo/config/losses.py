"""What each preference loss reads, for the rules of a config. The losses themselves: megadpo/objective/losses.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "cpo",
    "simpo",
    "orpo",
]
"""TRL's names, where TRL has the loss."""


@dataclass(frozen=True)
class LossTraits:
    """What one loss reads beside log-probabilities and beta."""

    options: tuple[str, ...] = ()
    """Fields of `dpo` that only some losses read."""
    needs_reference: bool = True
    needs_average: bool = False
    """Defined on means over an answer's tokens only."""


_DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")

LOSS_TRAITS: dict[LossType, LossTraits] = {
    "sigmoid": LossTraits(("label_smoothing", *_DIVERGENCE)),
    "hinge": LossTraits(_DIVERGENCE),
    "ipo": LossTraits(_DIVERGENCE),
    "exo_pair": LossTraits(("label_smoothing", *_DIVERGENCE)),
    "nca_pair": LossTraits(),
    "robust": LossTraits(("label_smoothing", *_DIVERGENCE)),
    "bco_pair": LossTraits(),
    "sppo_hard": LossTraits(),
    "apo_zero": LossTraits(),
    "apo_down": LossTraits(),
    "discopop": LossTraits(("discopop_tau", *_DIVERGENCE)),
    "cpo": LossTraits(("label_smoothing",), needs_reference=False),
    "simpo": LossTraits(("simpo_gamma",), needs_reference=False, needs_average=True),
    "orpo": LossTraits(needs_reference=False, needs_average=True),
}

LOSS_OPTIONS = tuple(dict.fromkeys(option for traits in LOSS_TRAITS.values() for option in traits.options))
"""Every field of `dpo` that only some losses read."""
