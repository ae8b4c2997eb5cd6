"""The inputs of the preference losses, and the options and checks that several of them share.

Shapes: P pairs. All log-probabilities are in nats; p, r, s, w and l as in losses.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.types import Range
from megadpo.config.variants import Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:  # a config is checked without torch
    torch, functional = Lazy("torch"), Lazy("torch.nn.functional")

MAX_EXPONENT = 80.0
"""Exponents are clamped to this. exp(89) is infinite in float32, and infinity minus infinity is NaN."""


@dataclass(frozen=True)
class PairFacts:
    """The data of P pairs other than their tokens. Every field is [P], or None if the data doesn't have it."""

    weights: Tensor | None = None
    """The weight of each pair's loss."""
    reward_gaps: Tensor | None = None
    """Reward of the chosen answer minus that of the rejected one."""
    chosen_answers: Tensor | None = None
    """int64: pairs with the same number have the same chosen answer."""
    ranking_shares: Tensor | None = None
    """The result of `ranking_shares` in data/batches/rankings.py."""


NOTHING = PairFacts()


@dataclass(frozen=True)
class PairScores:
    """The inputs of a preference loss. Every field but `facts` is [P], fp32 or fp64, one entry per pair.

    The log-probabilities are sums over the answer's tokens, or means over them under
    `dpo.preference_average_log_probs`. The reference fields carry no gradient and are None without a reference.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor | None
    reference_rejected_logps: Tensor | None
    chosen_tokens: Tensor
    """How many tokens of the chosen answer are in the loss."""
    rejected_tokens: Tensor
    facts: PairFacts = NOTHING

    @property
    def chosen_logratios(self) -> Tensor:
        """[P] log pi(chosen) - log pi_ref(chosen). Raises ValueError without a reference."""
        return self.policy_chosen_logps - _require_reference(self.reference_chosen_logps)

    @property
    def rejected_logratios(self) -> Tensor:
        """[P] log pi(rejected) - log pi_ref(rejected). Raises ValueError without a reference."""
        return self.policy_rejected_logps - _require_reference(self.reference_rejected_logps)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Base of the losses."""

    reads_reference: ClassVar[bool] = True
    """Whether it uses the reference's log-probabilities."""
    needs_average: ClassVar[bool] = False
    """Whether it is defined only on means over an answer's tokens."""
    reads_rewards: ClassVar[bool] = False
    """Whether it needs the rewards of both answers."""
    ranks: ClassVar[bool] = False
    """Whether it is a loss of rankings. Global batches then count rankings and never split one."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        """[P] losses of P pairs, with gradient. No collectives."""
        raise NotImplementedError

    def problems(self, known: Known) -> Iterator[Problem]:
        """The errors of this loss together with the rest of the config."""
        dpo = known.cfg.dpo
        fix = f"add {self.settings()}"
        if not self.reads_reference and dpo.reference.mode != "none":
            expected = f"none: dpo.loss_type {dpo.loss_type} reads no reference, which would only cost memory and time"
            yield Problem("dpo.reference.mode", dpo.reference.mode, expected, fix)
        if self.needs_average and not dpo.preference_average_log_probs:
            expected = f"true: dpo.loss_type {dpo.loss_type} is defined on means over an answer's tokens"
            yield Problem("dpo.preference_average_log_probs", False, expected, fix)

    @classmethod
    def settings(cls) -> str:
        """The settings that this loss needs on the command line in addition to dpo.loss_type."""
        needed = ["dpo.reference.mode=none"] * (not cls.reads_reference)
        return " ".join(needed + ["dpo.preference_average_log_probs=true"] * cls.needs_average)


@dataclass(frozen=True, kw_only=True)
class SmoothedLoss(Loss):
    """Base of the losses with label smoothing."""

    label_smoothing: Annotated[float, Range(ge=0, lt=0.5)] = 0.0
    """Share of pairs that are assumed to have chosen and rejected swapped."""


@dataclass(frozen=True, kw_only=True)
class DivergenceLoss(Loss):
    """Base of the losses that let the config choose a divergence."""

    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence that keeps the policy near the reference. DPO's is reverse_kl."""
    f_alpha_divergence_coef: float = 0.5
    """For alpha_divergence: the coefficient a of ((pi / pi_ref)^(a - 1) - 1) / (a - 1). Not 1: that is reverse_kl."""

    def scores(self, pairs: PairScores) -> tuple[Tensor, Tensor]:
        """[P] f'(pi / pi_ref) of both answers, for the f of `f_divergence_type`. For reverse_kl: the log-ratios, as in
        DPO. Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240; alpha_divergence has TRL's form, where the
        coefficient is 1 minus the paper's alpha."""
        pair = pairs.chosen_logratios, pairs.rejected_logratios
        match self.f_divergence_type:
            case "reverse_kl":
                return pair
            case "forward_kl":
                chosen, rejected = (-torch.expm1((-r).clamp(max=MAX_EXPONENT)) for r in pair)
            case "js_divergence":
                chosen, rejected = (math.log(2) + functional.logsigmoid(r) for r in pair)
            case "alpha_divergence":
                power = self.f_alpha_divergence_coef - 1
                chosen, rejected = (torch.expm1((power * r).clamp(max=MAX_EXPONENT)) / power for r in pair)
        return chosen, rejected

    def margins(self, pairs: PairScores, beta: float) -> Tensor:
        """[P] beta (s_w - s_l)."""
        chosen, rejected = self.scores(pairs)
        return beta * (chosen - rejected)

    def problems(self, known: Known) -> Iterator[Problem]:
        yield from super().problems(known)
        where, coefficient = "dpo.f_alpha_divergence_coef", self.f_alpha_divergence_coef
        if self.f_divergence_type == "alpha_divergence":
            if coefficient == 1:
                fix = "set dpo.f_divergence_type: reverse_kl, or another coefficient"
                yield Problem(where, coefficient, "a number other than 1, which would be reverse_kl", fix)
        elif coefficient != DivergenceLoss.f_alpha_divergence_coef:
            fix = "remove it, or set dpo.f_divergence_type: alpha_divergence"
            yield Problem(where, coefficient, "not set: only dpo.f_divergence_type alpha_divergence reads it", fix)


def _require_reference(reference_logps: Tensor | None) -> Tensor:
    if reference_logps is None:
        raise ValueError("this loss needs the reference's log-probabilities, but there is no reference")
    return reference_logps
