"""The preference losses: one function and one line of `LOSSES` each.

A new loss is a function `(scores, cfg.dpo) -> [P]` here and its name and what it reads in megadpo/config/losses.py;
normalisation, the SFT term, metrics and reductions (dpo.py) stay as they are. A loss is a sum over pairs, each from its
own log-probabilities: whatever looks at several pairs at once (TRL's aot sorts a micro-batch) would change with the
layout.

Shapes: P pairs. All log-probabilities are in nats. beta is `dpo.reference_policy_kl_penalty`. r_w and r_l are the
log-ratios of the chosen and the rejected answer; s_w and s_l what `f_divergence_type` makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megadpo.config.losses import LossType
from megadpo.config.schema_dpo import DpoConfig

MOST_EXPONENT = 80.0
"""exp() of more is kept at that: it would be infinite in float32 at 89, and the difference of two such is NaN."""


@dataclass(frozen=True)
class PairScores:
    """What a preference loss may look at. Every field is [P], fp32 or fp64, one entry per pair.

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
        return self.policy_chosen_logps - _present(self.reference_chosen_logps)

    @property
    def rejected_logratios(self) -> Tensor:
        """[P] log pi(rejected) - log pi_ref(rejected). Raises ValueError without a reference."""
        return self.policy_rejected_logps - _present(self.reference_rejected_logps)


PairLoss = Callable[[PairScores, DpoConfig], Tensor]
"""`(scores, cfg.dpo) -> [P]` losses."""


def sigmoid(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(beta (s_w - s_l)), [P]; with label smoothing e, (1 - e) of it and e of the swapped pair's.

    At policy = reference it is ln 2. `logsigmoid` never takes the logarithm of a number that underflowed: far on the
    wrong side the loss is linear with gradient -beta, far on the right side it is 0 with gradient 0.
    Source: equation 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; the same form as NeMo RL's DPO loss
    and TRL's loss_type "sigmoid". Smoothed: conservative DPO, Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.
    """
    return _smoothed(_margins(scores, cfg), cfg.label_smoothing)


def hinge(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """max(0, 1 - beta (s_w - s_l)), [P]. Source: SLiC's hinge on log-ratios, https://arxiv.org/abs/2309.06657."""
    return torch.relu(1 - _margins(scores, cfg))


def ipo(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """(s_w - s_l - 1 / (2 beta))^2, [P]; beta is the paper's tau. TRL takes means over an answer's tokens here: that is
    `preference_average_log_probs`. Source: equation 17 of Azar et al. 2023, https://arxiv.org/abs/2310.12036."""
    chosen, rejected = _divergence_scores(scores, cfg)
    return (chosen - rejected - 1 / (2 * cfg.reference_policy_kl_penalty)) ** 2


def exo_pair(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """KL(q || p), [P]: q = (sigmoid(m), sigmoid(-m)) with m = beta (s_w - s_l), p = (1 - e, e) with label smoothing e.
    Source: equation 16 of Ji et al. 2024, https://arxiv.org/abs/2402.00856."""
    margins, e = _margins(scores, cfg), cfg.label_smoothing
    chosen = torch.sigmoid(margins) * (logsigmoid(margins) - math.log1p(-e))
    rejected = torch.sigmoid(-margins) * (logsigmoid(-margins) - math.log(e))
    return chosen + rejected


def nca_pair(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2, [P].
    Source: Chen et al. 2024, https://arxiv.org/abs/2402.05369."""
    chosen, rejected = _rewards(scores, cfg)
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """((1 - e) l(m) - e l(-m)) / (1 - 2 e), [P]: l = -log sigmoid, m = beta (s_w - s_l), e (label smoothing) the share
    of pairs whose answers are swapped by mistake; unbiased under such noise.
    Source: Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409."""
    margins, e = _margins(scores, cfg), cfg.label_smoothing
    return (-(1 - e) * logsigmoid(margins) + e * logsigmoid(-margins)) / (1 - 2 * e)


def bco_pair(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(beta r_w) - log sigmoid(-beta r_l), [P]; without the paper's running shift, as in TRL's DPOTrainer.
    Source: Jung et al. 2024, https://arxiv.org/abs/2404.04656."""
    chosen, rejected = _rewards(scores, cfg)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


def sppo_hard(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, [P]: the winner wins with certainty.
    Source: equation 4.7 of Wu et al. 2024, https://arxiv.org/abs/2405.00675, with probabilities 1 and 0."""
    half = 0.5 / cfg.reference_policy_kl_penalty
    return (scores.chosen_logratios - half) ** 2 + (scores.rejected_logratios + half) ** 2


def apo_zero(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """sigmoid(-beta r_w) + sigmoid(beta r_l), [P]: raises chosen and lowers rejected answers, for chosen ones that are
    better than the model's own. Source: equation 7 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266."""
    chosen, rejected = _rewards(scores, cfg)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """sigmoid(beta r_w) + sigmoid(-beta (r_w - r_l)), [P]: lowers both, rejected ones more, for chosen answers that are
    worse than the model's own. Source: equation 8 of D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266."""
    chosen, rejected = _rewards(scores, cfg)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """(1 - w) (-log sigmoid(m)) + w exp(-m), [P]: m = beta (s_w - s_l), w = sigmoid(m / tau), tau `discopop_tau`.

    w exp(-m) is computed as one exponential: apart they are 0 x infinity for m below -88.
    Source: equation 5 of Lu et al. 2024, https://arxiv.org/abs/2406.08414.
    """
    margins = _margins(scores, cfg)
    sharpened = margins / cfg.discopop_tau
    return -logsigmoid(margins) * torch.sigmoid(-sharpened) + torch.exp(logsigmoid(sharpened) - margins)


def cpo(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(beta (log pi(chosen) - log pi(rejected))), [P]: DPO with a uniform reference. The paper adds the SFT
    term: `sft_loss_weight: 1`. Source: Xu et al. 2024, https://arxiv.org/abs/2401.08417."""
    margins = cfg.reference_policy_kl_penalty * (scores.policy_chosen_logps - scores.policy_rejected_logps)
    return _smoothed(margins, cfg.label_smoothing)


def simpo(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(beta (p_w - p_l) - gamma), [P]: p means of log-probabilities over an answer's tokens, gamma
    `simpo_gamma`. Source: equation 6 of Meng et al. 2024, https://arxiv.org/abs/2405.14734."""
    margins = cfg.reference_policy_kl_penalty * (scores.policy_chosen_logps - scores.policy_rejected_logps)
    return -logsigmoid(margins - cfg.simpo_gamma)


def orpo(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(log-odds(p_w) - log-odds(p_l)), [P]: p means of log-probabilities over an answer's tokens,
    log-odds(p) = p - log(1 - e^p). The paper's lambda is `preference_loss_weight`, its first term `sft_loss_weight: 1`;
    beta is in the logged rewards only. Source: Hong et al. 2024, https://arxiv.org/abs/2403.07691."""
    return -logsigmoid(_log_odds(scores.policy_chosen_logps) - _log_odds(scores.policy_rejected_logps))


LOSSES: dict[LossType, PairLoss] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "cpo": cpo,
    "simpo": simpo,
    "orpo": orpo,
}


def _margins(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """[P] beta (s_w - s_l)."""
    chosen, rejected = _divergence_scores(scores, cfg)
    return cfg.reference_policy_kl_penalty * (chosen - rejected)


def _rewards(scores: PairScores, cfg: DpoConfig) -> tuple[Tensor, Tensor]:
    """[P] beta r_w and beta r_l."""
    beta = cfg.reference_policy_kl_penalty
    return beta * scores.chosen_logratios, beta * scores.rejected_logratios


def _smoothed(margins: Tensor, label_smoothing: float) -> Tensor:
    """[P] -log sigmoid(margins), with a share of the swapped pair's loss."""
    if label_smoothing == 0:
        return -logsigmoid(margins)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def _divergence_scores(scores: PairScores, cfg: DpoConfig) -> tuple[Tensor, Tensor]:
    """[P] f'(pi / pi_ref) of both answers, f that of `f_divergence_type`. reverse_kl: the log-ratios, as in DPO.
    Source: Wang et al. 2023, https://arxiv.org/abs/2309.16240; alpha_divergence in TRL's form, whose coefficient is
    1 minus the paper's alpha."""
    pair = scores.chosen_logratios, scores.rejected_logratios
    match cfg.f_divergence_type:
        case "reverse_kl":
            return pair
        case "forward_kl":
            chosen, rejected = (-torch.expm1((-r).clamp(max=MOST_EXPONENT)) for r in pair)
        case "js_divergence":
            chosen, rejected = (math.log(2) + logsigmoid(r) for r in pair)
        case "alpha_divergence":
            power = cfg.f_alpha_divergence_coef - 1
            chosen, rejected = (torch.expm1((power * r).clamp(max=MOST_EXPONENT)) / power for r in pair)
    return chosen, rejected


def _log_odds(logps: Tensor) -> Tensor:
    """[P] log(p / (1 - p)) of probabilities given by their logarithms. At p = 1, where it is infinite, that of the
    largest p below 1."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def _present(reference_logps: Tensor | None) -> Tensor:
    if reference_logps is None:
        raise ValueError("this loss needs the reference's log-probabilities, and there is no reference")
    return reference_logps
