"""Plackett-Luce DPO against the product of the DPO paper's appendix A.3, and what weights of rows do; in float64."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from megadpo.config.schema import DpoConfig
from megadpo.objective.dpo import dpo_loss
from megadpo.objective.loss import PairFacts

BETA = 0.3


def written_out(ranking: list[list[Tensor]]) -> Tensor:
    """-log of the product over the answers, best first; ranking: beta times log-ratios, equally good answers together."""
    loss = torch.zeros((), dtype=torch.float64)
    for place, level in enumerate(ranking):
        below = [one for later in ranking[place + 1 :] for one in later]
        if below:
            for one in level:
                loss = loss - torch.log(one.exp() / (one.exp() + sum(other.exp() for other in below)))
    return loss


def losses_of(sizes: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """sizes: of each ranking the numbers of equally good answers, best first -> our mean, the formula's, policy logps [K]."""
    total = sum(sum(levels) for levels in sizes)
    rng = torch.Generator().manual_seed(0)
    reference = -40 * torch.rand(total, generator=rng, dtype=dtype) - 5
    policy = (reference + 4 * torch.randn(total, generator=rng, dtype=dtype)).requires_grad_()
    chosen, rejected, expected, first = [], [], [], 0
    rankings: list[list[tuple[int, int]]] = []
    for levels in sizes:
        ranking = []
        for size in levels:
            ranking.append(list(range(first, first + size)))
            first += size
        pairs = [(a, b) for better, worse in combinations(ranking, 2) for a in better for b in worse]
        rankings.append(pairs)
        ratios = BETA * (policy - reference)
        expected.append(written_out([[ratios[one] for one in level] for level in ranking]))
    every = [pair for pairs in rankings for pair in pairs]
    order = torch.randperm(len(every), generator=rng).tolist()  # the pairs of a ranking needn't stand together
    chosen, rejected = (torch.tensor(side) for side in zip(*(every[number] for number in order), strict=True))
    counts = torch.bincount(chosen)[chosen]
    facts = PairFacts(chosen_answers=chosen, ranking_shares=(len(every) / len(sizes) / counts).float())
    cfg = DpoConfig(loss_type="plackett_luce", reference_policy_kl_penalty=BETA)
    tokens = torch.ones(len(every))
    logps = [one[side] for one in (policy, reference) for side in (chosen, rejected)]
    found = dpo_loss(*logps, tokens, tokens, cfg, facts=facts)
    return found.loss_sum / len(every), torch.stack(expected).mean(), policy


@pytest.mark.parametrize(
    "sizes",
    [
        [[1, 1]],
        [[1, 1, 1, 1]],
        [[1, 1, 1], [1, 1], [1, 1, 1, 1, 1]],
        [[2, 1, 1], [1, 3], [2, 2]],
    ],
)
def test_the_product_written_out_and_its_gradient(sizes: list[list[int]]) -> None:
    mine, written, policy = losses_of(sizes)
    assert mine.item() == pytest.approx(written.item(), rel=1e-6)  # the shares are float32
    (my_gradient,) = torch.autograd.grad(mine, policy, retain_graph=True)
    (gradient,) = torch.autograd.grad(written, policy)
    torch.testing.assert_close(my_gradient, gradient, rtol=1e-6, atol=1e-9)


def test_where_policy_and_reference_are_equal_every_order_is_as_likely() -> None:
    logps = torch.full((6,), -3.0, dtype=torch.float64)
    chosen = torch.tensor([0, 0, 0, 1, 1, 2])
    shares = 6 / torch.tensor([3.0, 3, 3, 2, 2, 1])
    cfg = DpoConfig(loss_type="plackett_luce")
    facts = PairFacts(chosen_answers=chosen, ranking_shares=shares)
    found = dpo_loss(logps, logps, logps, logps, torch.ones(6), torch.ones(6), cfg, facts=facts)
    assert found.loss_sum.item() / 6 == pytest.approx(math.log(math.factorial(4)), rel=1e-7)


def test_float32_far_from_the_reference_stays_finite() -> None:
    policy = torch.tensor([-4000.0, -10.0, -2000.0], requires_grad=True)
    reference = torch.full((3,), -2000.0)
    chosen, rejected = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    facts = PairFacts(chosen_answers=chosen, ranking_shares=torch.tensor([1.5, 1.5, 3.0]))
    cfg, ones = DpoConfig(loss_type="plackett_luce"), torch.ones(3)
    found = dpo_loss(
        policy[chosen], policy[rejected], reference[chosen], reference[rejected], ones, ones, cfg, facts=facts
    )
    found.loss_sum.backward()
    assert found.loss_sum.isfinite() and policy.grad is not None and policy.grad.isfinite().all()


def test_without_whole_rankings_it_is_refused() -> None:
    logps = torch.zeros(2)
    with pytest.raises(ValueError, match="whole rankings"):
        dpo_loss(logps, logps, logps, logps, logps + 1, logps + 1, DpoConfig(loss_type="plackett_luce"))


def test_weights_of_rows_multiply_both_parts() -> None:
    rng = torch.Generator().manual_seed(1)
    logps = [(-9 * torch.rand(4, generator=rng, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    weights, tokens = torch.tensor([0.0, 1.0, 0.5, 3.0]), torch.tensor([2.0, 3.0, 4.0, 5.0])
    cfg = DpoConfig(sft_loss_weight=0.3, sft_average_log_probs=True)
    found = dpo_loss(*logps, tokens, tokens, cfg, facts=PairFacts(weights=weights))
    expected = 0.0
    for weight, count, (pw, pl, rw, rl) in zip(
        weights.tolist(), tokens.tolist(), zip(*(one.tolist() for one in logps), strict=True), strict=True
    ):
        margin = cfg.reference_policy_kl_penalty * ((pw - rw) - (pl - rl))
        expected += weight * (math.log1p(math.exp(-margin)) + 0.3 * -pw / count)
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-12)
    assert float(found.metrics["loss"][0]) == pytest.approx(expected, rel=1e-12)
    found.loss_sum.backward()
    assert logps[0].grad is not None and logps[0].grad[0] == 0 != logps[0].grad[3]
