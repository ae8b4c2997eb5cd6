"""The preference losses: one function and one line of `LOSSES` each.

A new loss is a function `(scores, cfg.dpo) -> [P]` here and its name in the config's list of `dpo.loss_type`;
normalisation, the SFT term, metrics and reductions (dpo.py) stay as they are.

Shapes: P pairs. All log-probabilities are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from megadpo.config.schema_dpo import DpoConfig


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


@dataclass(frozen=True)
class PairLoss:
    """An entry of `LOSSES`: `per_pair(scores, cfg.dpo) -> [P]` losses, and whether it reads the reference's fields."""

    per_pair: Callable[[PairScores, DpoConfig], Tensor]
    needs_reference: bool


def sigmoid(scores: PairScores, cfg: DpoConfig) -> Tensor:
    """-log sigmoid(beta (r_chosen - r_rejected)), [P]; r: log-ratio, beta: `reference_policy_kl_penalty`.

    At policy = reference it is ln 2. `logsigmoid` never takes the logarithm of a number that underflowed: far on the
    wrong side the loss is linear with gradient -beta, far on the right side it is 0 with gradient 0.
    Source: equation 7 of Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; the same form as NeMo RL's DPO loss
    and TRL's loss_type "sigmoid".
    """
    margin = scores.chosen_logratios - scores.rejected_logratios
    return -functional.logsigmoid(cfg.reference_policy_kl_penalty * margin)


LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, needs_reference=True),
}


def _present(reference_logps: Tensor | None) -> Tensor:
    if reference_logps is None:
        raise ValueError("this loss needs the reference's log-probabilities, and there is no reference")
    return reference_logps
