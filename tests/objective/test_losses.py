"""Every preference loss against its formula written out with `math`, pair by pair; extremes; gradients; any split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megadpo.config.schema import DpoConfig
from megadpo.config.variants import LOSSES
from megadpo.objective.dpo import LossOutput, dpo_loss, metric_names
from megadpo.objective.loss import PairFacts

BETA = 0.2
GAP = 1.7
"""Of the rewards of each pair."""


def l(x: float) -> float:  # noqa: E743 - as in the papers
    """-log sigmoid(x)."""
    return max(-x, 0.0) + math.log1p(math.exp(-abs(x)))


def s(x: float) -> float:
    """sigmoid(x)."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def odds(p: float) -> float:
    return math.log(math.exp(p) / (1 - math.exp(p)))


def exo(m: float, e: float) -> float:
    q = s(m)
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def kl(a: float, b: float) -> float:
    """Of Bernoulli distributions with probabilities sigmoid(a) and sigmoid(b)."""
    return s(a) * math.log(s(a) / s(b)) + s(-a) * math.log(s(-a) / s(-b))


def of_ratios(formula: Callable[[float, float], float]) -> Callable[..., float]:
    return lambda pw, pl, rw, rl: formula(pw - rw, pl - rl)


def of_margin(formula: Callable[[float], float]) -> Callable[..., float]:
    return lambda pw, pl, rw, rl: formula(BETA * ((pw - rw) - (pl - rl)))


def of_scores(score: Callable[[float], float]) -> Callable[..., float]:
    """DPO with another divergence's f'(pi / pi_ref), of the ratio itself."""
    return lambda pw, pl, rw, rl: l(BETA * (score(math.exp(pw - rw)) - score(math.exp(pl - rl))))


# Options of the loss; its value for one pair: log-probabilities of chosen and rejected by the policy, by the reference.
WRITTEN: dict[str, list[tuple[dict[str, Any], Callable[..., float]]]] = {
    "sigmoid": [
        ({}, of_margin(l)),
        ({"label_smoothing": 0.1}, of_margin(lambda m: 0.9 * l(m) + 0.1 * l(-m))),
        ({"f_divergence_type": "forward_kl"}, of_scores(lambda t: 1 - 1 / t)),
        ({"f_divergence_type": "js_divergence"}, of_scores(lambda t: math.log(2 * t / (1 + t)))),
        ({"f_divergence_type": "alpha_divergence"}, of_scores(lambda t: (t**-0.5 - 1) / -0.5)),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
            of_scores(lambda t: (t**0.5 - 1) / 0.5),
        ),
    ],
    "hinge": [({}, of_margin(lambda m: max(0.0, 1 - m)))],
    "ipo": [({}, of_ratios(lambda w, r: (w - r - 1 / (2 * BETA)) ** 2))],
    "exo_pair": [({"label_smoothing": 0.01}, of_margin(lambda m: exo(m, 0.01)))],
    "nca_pair": [({}, of_ratios(lambda w, r: l(BETA * w) + 0.5 * l(-BETA * w) + 0.5 * l(-BETA * r)))],
    "robust": [
        ({}, of_margin(l)),
        ({"label_smoothing": 0.2}, of_margin(lambda m: (0.8 * l(m) - 0.2 * l(-m)) / 0.6)),
    ],
    "bco_pair": [({}, of_ratios(lambda w, r: l(BETA * w) + l(-BETA * r)))],
    "sppo_hard": [({}, of_ratios(lambda w, r: (w - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2))],
    "apo_zero": [({}, of_ratios(lambda w, r: 1 - s(BETA * w) + s(BETA * r)))],
    "apo_down": [({}, of_ratios(lambda w, r: s(BETA * w) + 1 - s(BETA * (w - r))))],
    "discopop": [
        ({"discopop_tau": tau}, of_margin(lambda m, tau=tau: (1 - s(m / tau)) * l(m) + s(m / tau) * math.exp(-m)))  # type: ignore[misc]
        for tau in (0.05, 0.5)
    ],
    "cpo": [
        ({}, lambda pw, pl, rw, rl: l(BETA * (pw - pl))),
        ({"label_smoothing": 0.1}, lambda pw, pl, rw, rl: 0.9 * l(BETA * (pw - pl)) + 0.1 * l(BETA * (pl - pw))),
    ],
    "simpo": [
        ({"simpo_gamma": gamma}, lambda pw, pl, rw, rl, gamma=gamma: l(BETA * (pw - pl) - gamma))
        for gamma in (0.0, 1.4)
    ],
    "orpo": [({}, lambda pw, pl, rw, rl: l(odds(pw) - odds(pl)))],
    "sigmoid_norm": [({}, of_margin(l))],  # of means over tokens
    "rpo": [
        ({}, of_margin(lambda m: kl(GAP, m))),
        ({"rpo_distance": "fwd_kl", "rpo_reward_scale": 0.5}, of_margin(lambda m: kl(m, 0.5 * GAP))),
        ({"rpo_distance": "sq", "rpo_reward_scale": 2.0}, of_margin(lambda m: (m - 2 * GAP) ** 2)),
    ],
    "plackett_luce": [({}, of_margin(l))],  # rankings of two; longer ones: test_rankings.py
    "weighted": [
        (
            {
                "loss_weights": {"sigmoid": 0.8, "bco_pair": 0.2, "simpo": 0.5},
                "label_smoothing": 0.1,
                "simpo_gamma": 0.7,
            },
            lambda pw, pl, rw, rl: (
                0.8 * of_margin(lambda m: 0.9 * l(m) + 0.1 * l(-m))(pw, pl, rw, rl)
                + 0.2 * of_ratios(lambda w, r: l(BETA * w) + l(-BETA * r))(pw, pl, rw, rl)
                + 0.5 * l(BETA * (pw - pl) - 0.7)
            ),
        )
    ],
}
CASES = [(name, options, formula) for name, cases in WRITTEN.items() for options, formula in cases]
WITH_AND_WITHOUT_AVERAGE = [
    (*case, average)
    for case in CASES
    for average in (False, True)
    if average or not LOSSES[case[0]].needs_average
    if not (average and case[0] == "sigmoid_norm")  # it divides itself
]


def config(name: str, **options: Any) -> DpoConfig:
    of_loss = {key: options.pop(key) for key in LOSSES.keys().keys() & options.keys()}
    defaults = {"reference_policy_kl_penalty": BETA, "preference_average_log_probs": LOSSES[name].needs_average}
    return DpoConfig(loss_type=name, loss_options=of_loss, **{**defaults, **options})


def loss_of(cfg: DpoConfig, logps: list[Tensor], tokens: list[Tensor]) -> LossOutput:
    reference = logps[2:] if cfg.loss.reads_reference else [None, None]
    ones, number = torch.ones_like(logps[0]), torch.arange(len(tokens[0]))
    facts = PairFacts(reward_gaps=GAP * ones, chosen_answers=number, ranking_shares=ones)
    return dpo_loss(*logps[:2], *reference, *tokens, cfg, facts=facts)  # type: ignore[arg-type]


def inputs(num_pairs: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities [P] of 4 kinds, within some nats of each other as in training, and tokens of both answers."""
    rng = torch.Generator().manual_seed(seed)
    base = -60 * torch.rand(2, num_pairs, generator=rng, dtype=torch.float64) - 4
    reference = base + 3 * torch.randn(2, num_pairs, generator=rng, dtype=torch.float64).clamp(-1, 1)
    tokens = torch.randint(1, 30, (2, num_pairs), generator=rng)
    return [base[0].requires_grad_(), base[1].clone().detach().requires_grad_(), *reference], list(tokens)


def test_every_loss_of_the_config_is_there_and_written_out() -> None:
    assert set(LOSSES.names()) == set(WRITTEN)


@pytest.mark.parametrize(("name", "options", "formula", "average"), WITH_AND_WITHOUT_AVERAGE)
def test_the_formula_written_out(
    name: str, options: dict[str, Any], formula: Callable[..., float], average: bool
) -> None:
    cfg = config(name, **options, preference_average_log_probs=average)
    logps, tokens = inputs(9)
    found = loss_of(cfg, logps, tokens)
    rows = zip(*(column.tolist() for column in (*logps, *tokens)), strict=True)
    expected = 0.0
    for pw, pl, rw, rl, tw, tl in rows:
        divided = average or name == "sigmoid_norm"
        expected += formula(pw / tw, pl / tl, rw / tw, rl / tl) if divided else formula(pw, pl, rw, rl)
    assert found.loss_sum.item() == pytest.approx(expected, rel=1e-11)
    assert float(found.metrics["preference_loss"][0]) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("name", "options", "_formula"), CASES)
def test_no_pairs_have_no_loss(name: str, options: dict[str, Any], _formula: object) -> None:
    """As on a rank whose pack is padding: such a pack has no rewards and no rankings."""
    logps, tokens = inputs(0)
    cfg = config(name, **options)
    reference = logps[2:] if cfg.loss.reads_reference else [None, None]
    found = dpo_loss(*logps[:2], *reference, *tokens, cfg)  # type: ignore[arg-type]
    found.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert found.loss_sum.item() == 0 and float(found.metrics["preference_loss"][0]) == 0
    assert logps[0].grad is not None and found.metrics.keys() == {*metric_names(cfg, has_reference=True)}


@pytest.mark.parametrize(("name", "options", "_formula"), CASES)
def test_gradcheck(name: str, options: dict[str, Any], _formula: object) -> None:
    cfg = config(name, **options)
    logps, tokens = inputs(5, seed=1)
    assert torch.autograd.gradcheck(
        lambda chosen, rejected: loss_of(cfg, [chosen, rejected, *logps[2:]], tokens).loss_sum, logps[:2]
    )


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize(("name", "options", "_formula"), CASES)
def test_far_from_the_reference_loss_and_gradient_stay_finite(
    name: str, options: dict[str, Any], _formula: object, side: float
) -> None:
    """float32, log-ratios of +-2000 nats: a naive exponential is infinite there, and its product with 0 NaN."""
    cfg = config(name, **options)
    policy = [torch.tensor([-4000.0 + 2000 * side]), torch.tensor([-4000.0 - 2000 * side])]
    logps = [*(one.requires_grad_() for one in policy), torch.tensor([-4000.0]), torch.tensor([-4000.0])]
    output = loss_of(cfg, logps, [torch.tensor([1]), torch.tensor([1])])
    output.loss_sum.backward()
    assert math.isfinite(output.loss_sum.item())
    assert all(one.grad is not None and math.isfinite(one.grad.item()) for one in policy)


def test_odds_of_a_certain_answer_stay_finite() -> None:
    cfg = config("orpo")
    logps = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]
    output = loss_of(cfg, logps, [torch.tensor([3]), torch.tensor([5])])
    output.loss_sum.backward()
    assert output.loss_sum.item() == pytest.approx(math.log(2))
    assert all(one.grad is not None and math.isfinite(one.grad.item()) for one in logps)


@pytest.mark.parametrize(("name", "options", "_formula"), CASES)
def test_any_split_of_the_pairs_adds_up(name: str, options: dict[str, Any], _formula: object) -> None:
    """As micro-batches and ranks split them, a rank without pairs included."""
    cfg = config(name, **options)
    logps, tokens = inputs(7, seed=2)
    whole = loss_of(cfg, logps, tokens)
    (gradient,) = torch.autograd.grad(whole.loss_sum, logps[0])
    parts = [
        loss_of(cfg, [one[part] for one in logps], [one[part] for one in tokens])
        for part in (slice(0, 1), slice(1, 5), slice(5, 5), slice(5, 7))
    ]
    total = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, logps[0])[0], gradient, rtol=1e-12, atol=0)
    assert set(whole.metrics) == set(metric_names(cfg, has_reference=cfg.loss.reads_reference))
    for metric, (summed, _) in whole.metrics.items():
        assert float(summed) == pytest.approx(sum(float(part.metrics[metric][0]) for part in parts), rel=1e-12)


@pytest.mark.parametrize("name", [name for name in LOSSES.names() if not LOSSES[name].reads_reference])
def test_without_a_reference_rewards_are_of_the_policy_itself(name: str) -> None:
    cfg = config(name)
    logps, tokens = inputs(4)
    found = loss_of(cfg, logps, tokens).metrics
    chosen, rejected = (
        p.detach() / t if cfg.preference_average_log_probs else p.detach()
        for p, t in zip(logps[:2], tokens, strict=True)
    )
    assert float(found["rewards/margins"][0]) == pytest.approx(float(BETA * (chosen - rejected).sum()), rel=1e-12)
    assert float(found["rewards/accuracies"][0]) == float((chosen > rejected).sum())


def test_a_loss_that_needs_the_reference_says_so() -> None:
    logps, tokens = inputs(2)
    with pytest.raises(ValueError, match="'hinge' needs the reference"):
        dpo_loss(logps[0], logps[1], None, None, tokens[0], tokens[1], dataclasses.replace(config("hinge")))
