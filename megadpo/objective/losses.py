"""The preference losses, each in one place: its options, its rules, its formula and its source.

A new loss is one class here, or in a file that the config names in `plugins`: `@LOSSES.add(name)` on a dataclass whose
fields are its options. dpo.py does normalisation, the SFT term, metrics and reductions for all of them. The loss of a
pair may use only that pair's log-probabilities: a loss that compares pairs (TRL's aot sorts a micro-batch) would depend
on the layout.

docs/losses.md has a row for each loss, made from its docstring: the formula before "Source:", then the source. Shapes: P
pairs. All log-probabilities are in nats. w is the chosen answer, l the rejected one. p_w and p_l are the policy's
log-probabilities, r_w and r_l are p minus the reference's. s_w and s_l are f(r), where `f_divergence_type` chooses f.
beta is `dpo.reference_policy_kl_penalty`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.types import FloatOrZero, Range
from megadpo.config.variants import LOSSES, Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:  # a config is checked without torch
    torch, functional = Lazy("torch"), Lazy("torch.nn.functional")

MAX_EXPONENT = 80.0
"""Exponents are clamped to this. exp(89) is infinite in float32, and infinity minus infinity is NaN."""


@dataclass(frozen=True)
class PairScores:
    """The inputs of a preference loss. Every field is [P], fp32 or fp64, one entry per pair.

    The log-probabilities are sums over the answer's tokens, or means over them under
    `dpo.preference_average_log_probs`. The reference fields carry no gradient and are None without a reference.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor | None
    reference_rejected_logps: Tensor | None

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

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        """[P] losses of P pairs, with gradient. No collectives."""
        raise NotImplementedError

    def problems(self, known: Known) -> Iterator[Problem]:
        """What is wrong between this loss and the rest of the config."""
        dpo = known.cfg.dpo
        if not self.reads_reference and dpo.reference.mode != "none":
            expected = f"none: dpo.loss_type {dpo.loss_type} reads no reference, which would only cost memory and time"
            yield Problem("dpo.reference.mode", dpo.reference.mode, expected, "set dpo.reference.mode: none")
        if self.needs_average and not dpo.preference_average_log_probs:
            expected = f"true: dpo.loss_type {dpo.loss_type} is defined on means over an answer's tokens"
            yield Problem("dpo.preference_average_log_probs", False, expected, "set it to true")


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


@LOSSES.add("sigmoid")
@dataclass(frozen=True, kw_only=True)
class Sigmoid(SmoothedLoss, DivergenceLoss):
    """-log sigmoid(m), [P]: m = beta (s_w - s_l). With label smoothing e: (1 - e) times this plus e times -log sigmoid(-m).
    Source: equation 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; smoothed, conservative DPO: Mitchell
    2023, https://ericmitchell.ai/cdpo.pdf.

    The same as NeMo RL's DPO loss and TRL's loss_type "sigmoid". It is ln 2 where policy = reference. `logsigmoid` does not
    underflow: for very negative margins the loss is linear with gradient -beta, for very positive ones it is 0.
    """

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        return _smoothed(self.margins(scores, beta), self.label_smoothing)


@LOSSES.add("hinge")
@dataclass(frozen=True, kw_only=True)
class Hinge(DivergenceLoss):
    """max(0, 1 - beta (s_w - s_l)), [P]. Source: SLiC's hinge on log-ratios, https://arxiv.org/abs/2309.06657."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        return torch.relu(1 - self.margins(scores, beta))


@LOSSES.add("ipo")
@dataclass(frozen=True, kw_only=True)
class Ipo(DivergenceLoss):
    """(s_w - s_l - 1 / (2 beta))^2, [P]; beta is the paper's tau.
    Source: equation 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036.

    TRL takes means over an answer's tokens here: that is `preference_average_log_probs`."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, rejected = self.scores(scores)
        return (chosen - rejected - 1 / (2 * beta)) ** 2


@LOSSES.add("exo_pair")
@dataclass(frozen=True, kw_only=True)
class ExoPair(SmoothedLoss, DivergenceLoss):
    """KL(q || p), [P]: q = (sigmoid(m), sigmoid(-m)) with m = beta (s_w - s_l), p = (1 - e, e) with label smoothing e.
    Source: equation 16 of Ji et al. 2024, https://arxiv.org/abs/2402.00856."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        margins, e = self.margins(scores, beta), self.label_smoothing
        chosen = torch.sigmoid(margins) * (functional.logsigmoid(margins) - math.log1p(-e))
        rejected = torch.sigmoid(-margins) * (functional.logsigmoid(-margins) - math.log(e))
        return chosen + rejected

    def problems(self, known: Known) -> Iterator[Problem]:
        yield from super().problems(known)
        if self.label_smoothing == 0:
            expected = "more than 0: dpo.loss_type exo_pair takes its logarithm"
            yield Problem("dpo.label_smoothing", 0.0, expected, "set it to 0.001, as in the paper")


@LOSSES.add("nca_pair")
@dataclass(frozen=True, kw_only=True)
class NcaPair(Loss):
    """-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2, [P].
    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, rejected = _rewards(scores, beta)
        return (
            -functional.logsigmoid(chosen)
            - 0.5 * functional.logsigmoid(-chosen)
            - 0.5 * functional.logsigmoid(-rejected)
        )


@LOSSES.add("robust")
@dataclass(frozen=True, kw_only=True)
class Robust(SmoothedLoss, DivergenceLoss):
    """((1 - e) l(m) - e l(-m)) / (1 - 2 e), [P]: l = -log sigmoid, m = beta (s_w - s_l). e (label smoothing) is the share
    of pairs whose answers were swapped by mistake; the loss is unbiased under such noise.
    Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        margins, e = self.margins(scores, beta), self.label_smoothing
        return (-(1 - e) * functional.logsigmoid(margins) + e * functional.logsigmoid(-margins)) / (1 - 2 * e)


@LOSSES.add("bco_pair")
@dataclass(frozen=True, kw_only=True)
class BcoPair(Loss):
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l), [P]: without the paper's running shift, as in TRL's DPOTrainer.
    Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, rejected = _rewards(scores, beta)
        return -functional.logsigmoid(chosen) - functional.logsigmoid(-rejected)


@LOSSES.add("sppo_hard")
@dataclass(frozen=True, kw_only=True)
class SppoHard(Loss):
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, [P]: assumes that chosen wins with certainty.
    Source: equation 4.7 of Wu et al. 2024, https://arxiv.org/abs/2405.00675, with probabilities 1 and 0."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        half = 0.5 / beta
        return (scores.chosen_logratios - half) ** 2 + (scores.rejected_logratios + half) ** 2


@LOSSES.add("apo_zero")
@dataclass(frozen=True, kw_only=True)
class ApoZero(Loss):
    """sigmoid(-beta r_w) + sigmoid(beta r_l), [P]: raises chosen and lowers rejected answers. For chosen answers that are
    better than the model's own. Source: equation 7 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, rejected = _rewards(scores, beta)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@LOSSES.add("apo_down")
@dataclass(frozen=True, kw_only=True)
class ApoDown(Loss):
    """sigmoid(beta r_w) + sigmoid(-beta (r_w - r_l)), [P]: lowers both answers, rejected ones more. For chosen answers
    that are worse than the model's own. Source: equation 8 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, rejected = _rewards(scores, beta)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@LOSSES.add("discopop")
@dataclass(frozen=True, kw_only=True)
class Discopop(DivergenceLoss):
    """(1 - w) (-log sigmoid(m)) + w exp(-m), [P]: m = beta (s_w - s_l), w = sigmoid(m / tau), tau `discopop_tau`.
    Source: equation 5 of Lu et al. 2024, https://arxiv.org/abs/2406.08414.

    w exp(-m) is computed as one exponential, because for m below -88 the two factors are 0 and infinity.
    """

    discopop_tau: Annotated[float, Range(gt=0, le=1)] = 0.05
    """Temperature of discopop's weight w between its two parts."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        margins = self.margins(scores, beta)
        sharpened = margins / self.discopop_tau
        return -functional.logsigmoid(margins) * torch.sigmoid(-sharpened) + torch.exp(
            functional.logsigmoid(sharpened) - margins
        )


@LOSSES.add("cpo")
@dataclass(frozen=True, kw_only=True)
class Cpo(SmoothedLoss):
    """-log sigmoid(beta (p_w - p_l)), [P]: DPO with a uniform reference. The paper adds the SFT term:
    `sft_loss_weight: 1`. Source: Xu et al. 2024, https://arxiv.org/abs/2401.08417."""

    reads_reference = False

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        margins = beta * (scores.policy_chosen_logps - scores.policy_rejected_logps)
        return _smoothed(margins, self.label_smoothing)


@LOSSES.add("simpo")
@dataclass(frozen=True, kw_only=True)
class Simpo(Loss):
    """-log sigmoid(beta (p_w - p_l) - gamma), [P]: gamma is `simpo_gamma`.
    Source: equation 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734."""

    reads_reference = False
    needs_average = True
    simpo_gamma: FloatOrZero = 0.5
    """simpo's target margin, in units of beta x mean log-probability."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        margins = beta * (scores.policy_chosen_logps - scores.policy_rejected_logps)
        return -functional.logsigmoid(margins - self.simpo_gamma)


@LOSSES.add("orpo")
@dataclass(frozen=True, kw_only=True)
class Orpo(Loss):
    """-log sigmoid(log-odds(p_w) - log-odds(p_l)), [P]: log-odds(p) = p - log(1 - e^p). The paper's lambda is
    `preference_loss_weight`, its first term is `sft_loss_weight: 1`. beta changes only the logged rewards.
    Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691."""

    reads_reference = False
    needs_average = True

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        return -functional.logsigmoid(_log_odds(scores.policy_chosen_logps) - _log_odds(scores.policy_rejected_logps))


def _rewards(scores: PairScores, beta: float) -> tuple[Tensor, Tensor]:
    """[P] beta r_w and beta r_l."""
    return beta * scores.chosen_logratios, beta * scores.rejected_logratios


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """[P] -log sigmoid(margins), with label smoothing."""
    if label_smoothing == 0:
        return -functional.logsigmoid(margins)
    return -(1 - label_smoothing) * functional.logsigmoid(margins) - label_smoothing * functional.logsigmoid(-margins)


def _log_odds(logps: Tensor) -> Tensor:
    """[P] log(p / (1 - p)) from log p. p = 1 counts as the largest p below 1, because the result would be infinite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def _require_reference(reference_logps: Tensor | None) -> Tensor:
    if reference_logps is None:
        raise ValueError("this loss needs the reference's log-probabilities, but there is no reference")
    return reference_logps
