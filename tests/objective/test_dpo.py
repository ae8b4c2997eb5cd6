"""The DPO objective against its formula written out with `math`, at extremes, and under any split of the pairs."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megadpo.config.schema import DpoConfig
from megadpo.objective.dpo import LossOutput, dpo_loss, metric_names

ALL_METRICS = {
    "loss",
    "preference_loss",
    "sft_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
NEEDS_REFERENCE = {name for name in ALL_METRICS if name.startswith("rewards/")} | {"preference_loss"}

SETTINGS = [
    DpoConfig(),
    DpoConfig(reference_policy_kl_penalty=0.3, sft_loss_weight=0.5),
    DpoConfig(preference_average_log_probs=True, sft_average_log_probs=True, sft_loss_weight=2.0),
    DpoConfig(preference_average_log_probs=True, sft_average_log_probs=False, sft_loss_weight=0.1),
    DpoConfig(sft_average_log_probs=True, sft_loss_weight=0.1, preference_loss_weight=3.0),
    DpoConfig(preference_loss_weight=0.0, sft_loss_weight=1.0),
]


@dataclasses.dataclass
class Pairs:
    """[P] inputs of `dpo_loss`, in its order."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def loss(self, cfg: DpoConfig) -> LossOutput:
        return dpo_loss(
            self.policy_chosen,
            self.policy_rejected,
            self.reference_chosen,
            self.reference_rejected,
            self.chosen_tokens,
            self.rejected_tokens,
            cfg,
        )

    def take(self, index: list[int]) -> Pairs:
        return Pairs(*(getattr(self, f.name)[index] for f in dataclasses.fields(self)))


def make_pairs(num_pairs: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pairs:
    rng = torch.Generator().manual_seed(seed)

    def logps() -> Tensor:
        return -80 * torch.rand(num_pairs, generator=rng, dtype=dtype)

    def tokens() -> Tensor:
        return torch.randint(1, 60, (num_pairs,), generator=rng)

    return Pairs(
        logps().requires_grad_(),
        logps().requires_grad_(),
        logps(),
        logps(),
        tokens(),
        tokens(),
    )


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow; -log sigmoid(z) = softplus(-z)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def written_out(pairs: Pairs, cfg: DpoConfig) -> dict[str, float]:
    """Means over the pairs, from the formulas, one pair at a time in Python floats."""
    sums = dict.fromkeys(ALL_METRICS, 0.0)
    columns = [getattr(pairs, f.name).tolist() for f in dataclasses.fields(pairs)]
    rows = list(zip(*columns, strict=True))
    beta = cfg.reference_policy_kl_penalty
    for policy_w, policy_l, reference_w, reference_l, tokens_w, tokens_l in rows:
        r_w, r_l = policy_w - reference_w, policy_l - reference_l
        if cfg.preference_average_log_probs:
            r_w, r_l = r_w / tokens_w, r_l / tokens_l
        preference = softplus(-beta * (r_w - r_l))
        sft = -policy_w / tokens_w if cfg.sft_average_log_probs else -policy_w
        sums["loss"] += cfg.preference_loss_weight * preference + cfg.sft_loss_weight * sft
        sums["preference_loss"] += preference
        sums["sft_loss"] += sft
        sums["rewards/chosen"] += beta * r_w
        sums["rewards/rejected"] += beta * r_l
        sums["rewards/margins"] += beta * r_w - beta * r_l
        sums["rewards/accuracies"] += 1.0 if r_w > r_l else 0.0
        sums["logps/chosen"] += policy_w
        sums["logps/rejected"] += policy_l
    return {name: value / len(rows) for name, value in sums.items()}


def means(output: LossOutput) -> dict[str, float]:
    return {name: float(total) / float(count) for name, (total, count) in output.metrics.items()}


@pytest.mark.parametrize("cfg", SETTINGS)
def test_the_formula_written_out(cfg: DpoConfig) -> None:
    pairs = make_pairs(7)
    output = pairs.loss(cfg)
    expected = written_out(pairs, cfg)
    assert means(output) == pytest.approx(expected, rel=1e-12)
    assert output.loss_sum.item() / 7 == pytest.approx(expected["loss"], rel=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_equal_to_trl_sigmoid(beta: float) -> None:
    """TRL's DPOTrainer, loss_type "sigmoid", without label smoothing: -logsigmoid(beta * delta_score)."""
    pairs = make_pairs(9, seed=3)
    delta_score = (pairs.policy_chosen - pairs.reference_chosen) - (pairs.policy_rejected - pairs.reference_rejected)
    trl_loss = (-functional.logsigmoid(beta * delta_score)).mean()
    trl_chosen_rewards = beta * (pairs.policy_chosen - pairs.reference_chosen)

    output = pairs.loss(DpoConfig(reference_policy_kl_penalty=beta))

    torch.testing.assert_close(output.loss_sum / 9, trl_loss, rtol=1e-14, atol=0)
    assert means(output)["rewards/chosen"] == pytest.approx(trl_chosen_rewards.mean().item(), rel=1e-13)


@pytest.mark.parametrize("cfg", SETTINGS[:5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_reference_preference_loss_is_ln_2(cfg: DpoConfig, dtype: torch.dtype) -> None:
    pairs = make_pairs(5, dtype=dtype)
    pairs.reference_chosen = pairs.policy_chosen.detach().clone()
    pairs.reference_rejected = pairs.policy_rejected.detach().clone()
    found = means(pairs.loss(cfg))
    assert found["preference_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert found["rewards/margins"] == 0
    assert found["rewards/accuracies"] == 0  # a tie is not a win


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_extreme_log_ratios_keep_loss_and_gradient(dtype: torch.dtype, side: float) -> None:
    """At margins of +-2e4 the naive log(sigmoid(x)) is -inf and its gradient nan."""
    policy_chosen = torch.tensor([side * 1e4], dtype=dtype, requires_grad=True)
    policy_rejected = torch.tensor([-side * 1e4], dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=torch.int64)
    cfg = DpoConfig(reference_policy_kl_penalty=0.5)
    output = dpo_loss(policy_chosen, policy_rejected, zero, zero, one, one, cfg)
    output.loss_sum.backward()

    wrong_side = side < 0
    assert output.loss_sum.item() == (1e4 if wrong_side else 0.0)
    assert policy_chosen.grad is not None and policy_rejected.grad is not None
    assert policy_chosen.grad.item() == (-0.5 if wrong_side else 0.0)
    assert policy_rejected.grad.item() == (0.5 if wrong_side else 0.0)
    assert all(math.isfinite(value) for value in means(output).values())


@pytest.mark.parametrize("cfg", SETTINGS)
def test_gradcheck(cfg: DpoConfig) -> None:
    pairs = make_pairs(4, seed=1)

    def loss_sum(policy_chosen: Tensor, policy_rejected: Tensor) -> Tensor:
        return (
            dataclasses.replace(pairs, policy_chosen=policy_chosen, policy_rejected=policy_rejected).loss(cfg).loss_sum
        )

    assert torch.autograd.gradcheck(loss_sum, (pairs.policy_chosen, pairs.policy_rejected))


def test_the_reference_and_the_metrics_carry_no_gradient() -> None:
    pairs = make_pairs(3)
    pairs.reference_chosen.requires_grad_()
    pairs.reference_rejected.requires_grad_()
    output = pairs.loss(SETTINGS[1])
    output.loss_sum.backward()
    assert pairs.reference_chosen.grad is None and pairs.reference_rejected.grad is None
    assert not any(total.requires_grad for total, _ in output.metrics.values())


@given(
    owner=st.lists(st.integers(min_value=0, max_value=3), min_size=1, max_size=12),
    cfg=st.sampled_from(SETTINGS),
    seed=st.integers(min_value=0, max_value=1000),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_any_split_of_the_pairs_adds_up(owner: list[int], cfg: DpoConfig, seed: int) -> None:
    """owner[i] is the micro-batch of pair i; some micro-batches are empty. Loss, gradient and metrics must add up."""
    whole = make_pairs(len(owner), seed=seed)
    expected = whole.loss(cfg)
    (expected_gradient,) = torch.autograd.grad(expected.loss_sum, whole.policy_chosen)

    parts = [whole.take([i for i, part in enumerate(owner) if part == wanted]).loss(cfg) for wanted in range(4)]

    loss_sum = torch.stack([part.loss_sum for part in parts]).sum()
    (gradient,) = torch.autograd.grad(loss_sum, whole.policy_chosen)
    torch.testing.assert_close(loss_sum, expected.loss_sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-12)
    assert sum(part.metrics["loss"][1] for part in parts) == len(owner)
    assert set(expected.metrics) == ALL_METRICS
    for name, (total, count) in expected.metrics.items():
        found_sum = sum(float(part.metrics[name][0]) for part in parts)
        found_count = sum(float(part.metrics[name][1]) for part in parts)
        assert found_sum == pytest.approx(float(total), rel=1e-12, abs=1e-12)
        assert found_count == float(count)


@pytest.mark.parametrize("cfg", SETTINGS)
def test_no_pairs_gives_zero_sums_with_gradient(cfg: DpoConfig) -> None:
    pairs = make_pairs(0, dtype=torch.float32)
    output = pairs.loss(cfg)
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0 and output.metrics["loss"][1] == 0
    assert pairs.policy_chosen.grad is not None and pairs.policy_rejected.grad is not None
    assert {name: (float(total), float(count)) for name, (total, count) in output.metrics.items()} == dict.fromkeys(
        ALL_METRICS, (0.0, 0.0)
    )


def test_every_answer_gets_a_gradient_even_when_the_loss_ignores_it() -> None:
    """SFT reads the chosen answers only; the rejected ones get a zero gradient, not a missing one."""
    pairs = make_pairs(3)
    pairs.loss(SETTINGS[5]).loss_sum.backward()
    assert pairs.policy_rejected.grad is not None
    assert torch.equal(pairs.policy_rejected.grad, torch.zeros(3, dtype=torch.float64))


def test_without_a_reference_only_sft_remains() -> None:
    pairs = make_pairs(4)
    cfg = DpoConfig(preference_loss_weight=0.0, sft_loss_weight=1.0)
    tokens = (pairs.chosen_tokens, pairs.rejected_tokens)
    output = dpo_loss(pairs.policy_chosen, pairs.policy_rejected, None, None, *tokens, cfg)
    expected = written_out(pairs, cfg)
    assert means(output) == pytest.approx({n: expected[n] for n in ALL_METRICS - NEEDS_REFERENCE}, rel=1e-12)


def test_metric_names_are_those_of_the_output() -> None:
    pairs = make_pairs(2)
    cfg = DpoConfig(preference_loss_weight=0.0, sft_loss_weight=1.0)
    tokens = (pairs.chosen_tokens, pairs.rejected_tokens)
    assert set(metric_names(cfg, has_reference=True)) == set(pairs.loss(cfg).metrics)
    output = dpo_loss(pairs.policy_chosen, pairs.policy_rejected, None, None, *tokens, cfg)
    assert set(metric_names(cfg, has_reference=False)) == set(output.metrics)


def test_a_part_of_weight_zero_stays_out_of_the_sum() -> None:
    """0 x inf is nan: a reference that scores a rejected answer -inf must not spoil pure SFT."""
    pairs = make_pairs(2)
    pairs.reference_rejected[0] = -math.inf
    output = pairs.loss(DpoConfig(preference_loss_weight=0.0, sft_loss_weight=1.0))
    assert math.isfinite(output.loss_sum.item())


def test_low_precision_inputs_are_computed_in_fp32() -> None:
    pairs = make_pairs(3, dtype=torch.bfloat16)
    output = pairs.loss(SETTINGS[1])
    assert output.loss_sum.dtype == torch.float32
    assert output.metrics["rewards/margins"][0].dtype == torch.float32


def test_a_missing_reference_is_refused() -> None:
    pairs = make_pairs(2)
    tokens = (pairs.chosen_tokens, pairs.rejected_tokens)
    with pytest.raises(ValueError, match="preference_loss_weight must be 0"):
        dpo_loss(pairs.policy_chosen, pairs.policy_rejected, None, None, *tokens, DpoConfig())
    with pytest.raises(ValueError, match="both answers or for none"):
        dpo_loss(pairs.policy_chosen, pairs.policy_rejected, pairs.reference_chosen, None, *tokens, DpoConfig())


@pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
def test_a_shape_that_would_broadcast_is_refused(shape: tuple[int, ...]) -> None:
    pairs = make_pairs(3)
    pairs.reference_chosen = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match="one entry per pair"):
        pairs.loss(DpoConfig())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_host_synchronisation_on_the_gpu() -> None:
    pairs = make_pairs(5, dtype=torch.float32)
    moved = Pairs(*(getattr(pairs, f.name).detach().cuda() for f in dataclasses.fields(pairs)))
    moved.policy_chosen.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved.loss(SETTINGS[2]).loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.policy_chosen.grad is not None


def test_weights_of_pairs_and_sums_over_whole_answers() -> None:
    """use_weighting multiplies the preference loss only; with ld_alpha the SFT loss and logps are of whole answers."""
    pairs = make_pairs(5)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.25], dtype=torch.float64, requires_grad=True)
    whole = make_pairs(5, seed=7)
    cfg = DpoConfig(sft_loss_weight=0.5)
    arguments = [getattr(pairs, f.name) for f in dataclasses.fields(pairs)]
    found = dpo_loss(*arguments, cfg, whole_logps=(whole.policy_chosen, whole.policy_rejected), pair_weights=weights)
    each = [written_out(pairs.take([i]), cfg)["preference_loss"] for i in range(5)]
    preference = sum(w * one for w, one in zip(weights.tolist(), each, strict=True))
    sft = -float(whole.policy_chosen.sum())
    assert float(found.metrics["preference_loss"][0]) == pytest.approx(preference, rel=1e-12)
    assert float(found.metrics["sft_loss"][0]) == pytest.approx(sft, rel=1e-12)
    assert found.loss_sum.item() == pytest.approx(preference + 0.5 * sft, rel=1e-12)
    assert float(found.metrics["logps/rejected"][0]) == pytest.approx(float(whole.policy_rejected.sum()), rel=1e-12)
    assert float(found.metrics["rewards/chosen"][0]) == pytest.approx(5 * means(pairs.loss(cfg))["rewards/chosen"])
    found.loss_sum.backward()
    assert weights.grad is None
