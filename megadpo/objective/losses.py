"""The preference losses, each in one place: its options, its rules, its formula and its source.

A new loss is one class here, or in a file that the config names in `plugins`: `@LOSSES.add(name)` on a dataclass whose
fields are its options. dpo.py does normalisation, the SFT term, metrics and reductions for all of them. The loss of a
pair may use only that pair's log-probabilities, or its ranking's: a loss that compares other pairs (TRL's aot sorts a
micro-batch) would depend on the layout.

docs/losses.md has a row for each loss, made from its docstring: the formula before "Source:", then the source. Shapes: P
pairs. All log-probabilities are in nats. w is the chosen answer, l the rejected one. p_w and p_l are the policy's
log-probabilities, r_w and r_l are p minus the reference's. s_w and s_l are f(r), where `f_divergence_type` chooses f.
beta is `dpo.reference_policy_kl_penalty`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.types import FloatOrZero, PositiveFloat, Range
from megadpo.config.variants import LOSSES, Lazy
from megadpo.objective.loss import DivergenceLoss, Loss, PairScores, SmoothedLoss

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional
else:  # a config is checked without torch
    torch, functional = Lazy("torch"), Lazy("torch.nn.functional")


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


@LOSSES.add("sigmoid_norm")
@dataclass(frozen=True, kw_only=True)
class SigmoidNorm(DivergenceLoss):
    """-log sigmoid(beta (s_w / T_w - s_l / T_l)), [P]: T is the number of an answer's tokens. Rewards stay sums.
    Source: TRL's loss_type of this name; length-normalised DPO: Lambert et al. 2024, https://arxiv.org/abs/2411.15124."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, rejected = self.scores(scores)
        return -functional.logsigmoid(beta * (chosen / scores.chosen_tokens - rejected / scores.rejected_tokens))

    def problems(self, known: Known) -> Iterator[Problem]:
        yield from super().problems(known)
        if known.cfg.dpo.preference_average_log_probs:
            expected = "false: dpo.loss_type sigmoid_norm divides by the tokens itself"
            yield Problem("dpo.preference_average_log_probs", True, expected, "set it to false, or loss_type: sigmoid")


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


@LOSSES.add("rpo")
@dataclass(frozen=True, kw_only=True)
class Rpo(Loss):
    """D(g || m), [P]: m = beta (r_w - r_l), g = `rpo_reward_scale` x (reward of w - reward of l), D `rpo_distance`: bwd_kl,
    sigmoid(g) (log sigmoid(g) - log sigmoid(m)) + sigmoid(-g) (log sigmoid(-g) - log sigmoid(-m)); fwd_kl, the same with g and
    m exchanged; sq, (m - g)^2.
    Source: reward-aware preference optimization, NVIDIA 2024, https://arxiv.org/abs/2406.11704, with its eta as the scale;
    NeMo Aligner's rpo_bwd_kl (the paper's), rpo_fwd_kl and rpo_sq."""

    reads_rewards = True

    rpo_reward_scale: PositiveFloat = 1.0
    """rpo: the rewards' gap is multiplied by this (the paper's eta)."""
    rpo_distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"
    """rpo: how far the policy's gap may be from the rewards'. bwd_kl is the paper's."""

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        if scores.facts.reward_gaps is None:
            raise ValueError("dpo.loss_type rpo needs the rewards of both answers")
        margins = beta * (scores.chosen_logratios - scores.rejected_logratios)
        gaps = self.rpo_reward_scale * scores.facts.reward_gaps.to(margins.dtype)
        match self.rpo_distance:
            case "bwd_kl":
                return _bernoulli_kl(gaps, margins)
            case "fwd_kl":
                return _bernoulli_kl(margins, gaps)
            case "sq":
                return (margins - gaps) ** 2


@LOSSES.add("plackett_luce")
@dataclass(frozen=True, kw_only=True)
class PlackettLuce(Loss):
    """-log of the product over a ranking's answers y_1, y_2, ..., best first, of exp(beta r_k) / sum_(j >= k) exp(beta r_j),
    a mean over rankings; of answers that are equally good, none is in another's sum. `train_global_batch_size` counts
    rankings. Source: the end of appendix A.3 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290.

    Of a pair: its share of log(1 + sum_j exp(beta (r_j - r_w))), j the answers that are worse than w. For two answers this is
    sigmoid's loss. The answers of a ranking must be in one micro-batch.
    """

    ranks = True

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        chosen, shares = scores.facts.chosen_answers, scores.facts.ranking_shares
        if chosen is None or shares is None:
            raise ValueError("dpo.loss_type plackett_luce needs batches of whole rankings")
        worse = beta * (scores.rejected_logratios - scores.chosen_logratios)
        same = chosen[:, None] == chosen[None, :]
        sums = worse[None, :].expand(same.shape).masked_fill(~same, -math.inf).logsumexp(dim=1)
        return shares.to(worse.dtype) * -functional.logsigmoid(-sums)

    def problems(self, known: Known) -> Iterator[Problem]:
        yield from super().problems(known)
        cfg, packing = known.cfg, known.cfg.policy.sequence_packing
        if cfg.data.train_shares is not None:
            expected = "no weights: plackett_luce is a loss of whole rankings, and weights count pairs"
            yield Problem(
                "data.train_data_path", ", ".join(cfg.data.train_paths), expected, "write a list of the paths"
            )
        if cfg.data.on_too_long == "truncate":
            expected = "refuse or drop: truncation gives each pair of a ranking another prompt"
            yield Problem("data.on_too_long", cfg.data.on_too_long, expected, "set it to drop, or raise the limit")
        for where, value, needed in (
            ("data.group_prompts", cfg.data.group_prompts, True),
            ("policy.sequence_packing.enabled", packing.enabled, True),
            ("policy.sequence_packing.share_prompt", packing.share_prompt, True),
            ("dpo.ld_alpha", cfg.dpo.ld_alpha, None),
            ("dpo.use_weighting", cfg.dpo.use_weighting, False),
        ):
            if value != needed:
                expected = (
                    f"{'null' if needed is None else str(needed).lower()}: plackett_luce is a loss of whole rankings"
                )
                yield Problem(where, value, expected, "set it so, or choose another dpo.loss_type")


@LOSSES.add("weighted")
@dataclass(frozen=True, kw_only=True)
class Weighted(Loss):
    """Other losses, each times its weight of `loss_weights`, added up, [P]; so are TRL's lists `loss_type: [sigmoid,
    bco_pair]` and `loss_weights: [0.8, 0.2]`. Source: mixed preference optimisation, Wang et al. 2024,
    https://arxiv.org/abs/2411.10442."""

    loss_weights: dict[str, FloatOrZero] | None = None
    """weighted: {loss_type: weight}, e.g. {sigmoid: 0.8, bco_pair: 0.2}. The options are those of all of them."""

    def made_of(self, options: Mapping[str, Any]) -> WeightedSum:
        """The losses that it names, with their `options`; names that are no loss are left to `problems`."""
        weights = self.loss_weights or {}
        parts = {name: LOSSES.configured(name, options) for name in weights if name in LOSSES and name != "weighted"}
        return WeightedSum(loss_weights=self.loss_weights, parts=parts)


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Weighted):
    """`Weighted` with its losses."""

    parts: Mapping[str, Loss]

    def __getattr__(self, name: str) -> Any:
        """An option of one of the losses."""
        for part in self.__dict__.get("parts", {}).values():
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(name)

    @property
    def reads_reference(self) -> bool:  # type: ignore[override]
        return any(part.reads_reference for part in self.parts.values())

    @property
    def reads_rewards(self) -> bool:  # type: ignore[override]
        return any(part.reads_rewards for part in self.parts.values())

    @property
    def ranks(self) -> bool:  # type: ignore[override]
        return any(part.ranks for part in self.parts.values())

    def pair_losses(self, scores: PairScores, beta: float) -> Tensor:
        weights = self.loss_weights or {}
        return torch.stack([weights[name] * one.pair_losses(scores, beta) for name, one in self.parts.items()]).sum(0)

    def problems(self, known: Known) -> Iterator[Problem]:
        others = [name for name in LOSSES.names() if name != "weighted"]
        unknown = [name for name in self.loss_weights or {} if name not in others]
        if unknown or not self.loss_weights:
            expected = f"names and weights of losses: {', '.join(others)}"
            yield Problem(
                "dpo.loss_weights", ", ".join(unknown) or None, expected, "for example {sigmoid: 0.8, bco_pair: 0.2}"
            )
        for part in self.parts.values():
            for problem in part.problems(known):
                if not (self.reads_reference and problem.where == "dpo.reference.mode"):  # another one reads it
                    yield problem


def _rewards(scores: PairScores, beta: float) -> tuple[Tensor, Tensor]:
    """[P] beta r_w and beta r_l."""
    return beta * scores.chosen_logratios, beta * scores.rejected_logratios


def _bernoulli_kl(target: Tensor, margins: Tensor) -> Tensor:
    """[P] KL(Bernoulli(sigmoid(target)) || Bernoulli(sigmoid(margins)))."""
    chosen = torch.sigmoid(target) * (functional.logsigmoid(target) - functional.logsigmoid(margins))
    return chosen + torch.sigmoid(-target) * (functional.logsigmoid(-target) - functional.logsigmoid(-margins))


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """[P] -log sigmoid(margins), with label smoothing."""
    if label_smoothing == 0:
        return -functional.logsigmoid(margins)
    return -(1 - label_smoothing) * functional.logsigmoid(margins) - label_smoothing * functional.logsigmoid(-margins)


def _log_odds(logps: Tensor) -> Tensor:
    """[P] log(p / (1 - p)) from log p. p = 1 counts as the largest p below 1, because the result would be infinite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))
