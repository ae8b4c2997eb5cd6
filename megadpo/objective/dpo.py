"""NeMo RL's DPO objective on log-probabilities of pairs, as sums and counts. losses.py has the preference losses.

    loss = preference_loss_weight x preference_loss + sft_loss_weight x sft_loss

Both parts are means over the pairs of the GLOBAL batch. A micro-batch holds only some of those pairs, so this module
returns sums: the caller divides by the global number of pairs, and any split over micro-batches and ranks gives the
same loss and gradient.

Shapes: P pairs of this micro-batch. Log-probabilities are in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megadpo.config.metric import METRICS
from megadpo.config.schema import DpoConfig
from megadpo.objective.loss import NOTHING, Loss, PairFacts, PairScores


@dataclass(frozen=True)
class LossOutput:
    """What one micro-batch adds to the loss and the metrics of its global batch.

    loss_sum: scalar, fp32 or fp64, with gradient: the sum of the pairs' losses. The caller divides it by the number of
        pairs in the global batch.
    metrics: name -> (sum, count). Sums are detached scalars on the inputs' device. The exact mean is the total of the
        sums over the total of the counts, over all micro-batches and data-parallel ranks.
    """

    loss_sum: Tensor
    metrics: dict[str, tuple[Tensor, Tensor | float]]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    cfg: DpoConfig,
    *,
    whole_logps: tuple[Tensor, Tensor] | None = None,
    pair_weights: Tensor | None = None,
    facts: PairFacts = NOTHING,
) -> LossOutput:
    """The loss of P pairs and its metrics. Runs no collectives and does not synchronise with the host.

    All tensors are [P]. `*_logps` are sums of log-probabilities over the answer's tokens; `*_tokens` count those tokens.
    The dtype is the widest of the inputs', at least fp32. P = 0 gives zero sums with a (zero) gradient, for ranks without pairs.

    whole_logps: the policy's sums over all tokens of both answers, for the SFT loss and the logged logps, where `*_logps`
    weigh some tokens less (`ld_alpha`). pair_weights: each pair's preference loss is multiplied by this, which gets no
    gradient (`use_weighting`). facts: what the data says; its weights multiply both parts of a pair's loss.

    The reference may be None only with `preference_loss_weight: 0` or a loss that reads none. It gets no gradient.

    Metrics: see `metric_names`. A reward is beta x r. r is the log-ratio that the loss uses (a per-token mean under
    `preference_average_log_probs`), so sigmoid's loss is -log sigmoid(margin). NeMo RL logs rewards without beta. If the
    loss reads no reference, r is the policy's log-probability. accuracies counts pairs with chosen reward > rejected
    reward; a tie counts as wrong, as in NeMo RL and TRL. logps are always sums over the answer's tokens.

    Raises ValueError for a shape other than [P], or if the loss needs a reference and there is none.
    """
    logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    whole = whole_logps or (policy_chosen_logps, policy_rejected_logps)
    _check_shapes(*logps, chosen_tokens, rejected_tokens, *whole, pair_weights, *vars(facts).values())
    dtype = _compute_dtype(*logps)
    policy = policy_chosen_logps.to(dtype), policy_rejected_logps.to(dtype)
    tokens = chosen_tokens.to(dtype), rejected_tokens.to(dtype)
    scores = _pair_scores(policy, (reference_chosen_logps, reference_rejected_logps), tokens, cfg, facts)
    whole_chosen, whole_rejected = (one.to(dtype) for one in whole)

    # A part with weight 0 is not added at all, because 0 x inf is nan. The empty sums keep a gradient path anyway.
    loss_sum = policy[0][:0].sum() + policy[1][:0].sum()
    metrics: dict[str, Tensor] = {}

    preference = _preference_losses(scores, cfg, pair_weights)
    if preference is not None:
        preference = _times(preference, facts.weights)
        if cfg.preference_loss_weight != 0:
            loss_sum = loss_sum + cfg.preference_loss_weight * preference.sum()
        metrics["preference_loss"] = preference.sum()

    sft = _times(_sft_losses(whole_chosen, tokens[0], cfg), facts.weights)
    if cfg.sft_loss_weight != 0:
        loss_sum = loss_sum + cfg.sft_loss_weight * sft.sum()
    metrics["sft_loss"] = sft.sum()

    metrics |= _reward_sums(scores, cfg)
    metrics |= {"logps/chosen": whole_chosen.sum(), "logps/rejected": whole_rejected.sum()}
    sums, num_pairs = {"loss": loss_sum, **metrics}, float(len(whole_chosen))
    return LossOutput(loss_sum, {name: (value.detach(), num_pairs) for name, value in sums.items()})


def _pair_scores(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor | None, Tensor | None],
    tokens: tuple[Tensor, Tensor],
    cfg: DpoConfig,
    facts: PairFacts,
) -> PairScores:
    """Chosen and rejected each: the policy's sums, the reference's, and tokens, all but the reference's in one dtype."""
    divisors = tokens if cfg.preference_average_log_probs else (torch.ones_like(tokens[0]),) * 2
    chosen, rejected = (logps / divisor for logps, divisor in zip(policy, divisors, strict=True))
    reference_chosen, reference_rejected = (
        None if logps is None else logps.detach().to(chosen.dtype) / divisor
        for logps, divisor in zip(reference, divisors, strict=True)
    )
    return PairScores(chosen, rejected, reference_chosen, reference_rejected, *tokens, facts)


def _preference_losses(scores: PairScores, cfg: DpoConfig, pair_weights: Tensor | None) -> Tensor | None:
    """[P] losses of `cfg.loss_type`, times the weights. None if the loss needs a reference and there is none; its weight must
    then be 0. With P = 0 the loss isn't called: without pairs the facts that it reads may be missing."""
    if cfg.loss.reads_reference and scores.reference_chosen_logps is None:
        if cfg.preference_loss_weight != 0:
            raise ValueError(
                f"dpo.loss_type {cfg.loss_type!r} needs the reference's log-probabilities; without a reference "
                "dpo.preference_loss_weight must be 0"
            )
        return None
    if len(scores.policy_chosen_logps) == 0:
        return scores.policy_chosen_logps
    loss: Loss = cfg.loss
    return _times(loss.pair_losses(scores, cfg.reference_policy_kl_penalty), pair_weights)


def _times(losses: Tensor, weights: Tensor | None) -> Tensor:
    """[P] losses times weights, which get no gradient."""
    return losses if weights is None else losses * weights.detach().to(losses.dtype)


def _sft_losses(policy_chosen_logps: Tensor, chosen_tokens: Tensor, cfg: DpoConfig) -> Tensor:
    """[P] -log pi(chosen): the sum over its tokens, or their mean."""
    return -policy_chosen_logps / chosen_tokens if cfg.sft_average_log_probs else -policy_chosen_logps


def _reward_sums(scores: PairScores, cfg: DpoConfig) -> dict[str, Tensor]:
    """Sums of the implicit rewards over the pairs. Empty if the loss needs a reference and there is none."""
    if not cfg.loss.reads_reference:
        chosen, rejected = scores.policy_chosen_logps.detach(), scores.policy_rejected_logps.detach()
    elif scores.reference_chosen_logps is not None:
        chosen, rejected = scores.chosen_logratios.detach(), scores.rejected_logratios.detach()
    else:
        return {}
    chosen, rejected = cfg.reference_policy_kl_penalty * chosen, cfg.reference_policy_kl_penalty * rejected
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).sum(),
    }


def _compute_dtype(*logps: Tensor | None) -> torch.dtype:
    """The widest dtype among the log-probabilities, at least fp32."""
    dtype = torch.float32
    for tensor in logps:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_shapes(policy_chosen_logps: Tensor, *others: Tensor | None) -> None:
    """Compares all shapes: [P, 1] with [P] would broadcast to [P, P] and give a wrong loss without an error."""
    reference_chosen, reference_rejected = others[1], others[2]
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("the reference's log-probabilities must be given for both answers or for none")
    shapes = [tuple(t.shape) for t in (policy_chosen_logps, *others) if t is not None]
    if policy_chosen_logps.dim() != 1 or len(set(shapes)) != 1:
        raise ValueError(f"every tensor must be [P], one entry per pair; got shapes {shapes}")


def metric_names(cfg: DpoConfig, *, has_reference: bool) -> list[str]:
    """All names in `LossOutput.metrics`. A rank that computes no loss needs them to join the reduction."""
    has_rewards = has_reference or not cfg.loss.reads_reference
    return sorted(name for name, metric in METRICS.items() if has_rewards or not metric.needs_rewards)
