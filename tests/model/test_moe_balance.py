"""The load-balancing loss against megatron-core's formula and autograd, and the sets it is over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.batches.pack import pack_pairs
from megadpo.model.moe_balance import LoadBalance, TokenSets, answer_sequences, balance_loss, balance_metrics
from tests.model.kernels.test_kernels import random_pairs

LENGTHS = [(40, 20, 7), (1, 1, 2), (3, 50, 30)]
TOPK, EXPERTS = 2, 5


def pack(share_prompt, lengths=LENGTHS, multiple=8):
    return pack_pairs(random_pairs(lengths, 320), share_prompt=share_prompt, pad_to_multiple=multiple, pad_token_id=0)


def balance(kind="aux_loss", coefficient=0.5):
    return LoadBalance(kind, coefficient, layers=range(3), device=torch.device("cpu"))


def logits_of(batch):
    """A function of the token and its position alone, as a model's are of a sequence: shared or not, the same."""
    key = (batch.tokens * 131 + batch.positions * 7 + 1).double()
    return torch.stack([torch.sin(key * (e + 1)) for e in range(EXPERTS)], dim=1).float()


def test_one_micro_batch_is_megatron_cores_formula():
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

    batch = pack(True)
    scores = logits_of(batch).softmax(-1)
    real = scores[: batch.num_tokens]
    counts = torch.zeros_like(real).scatter_(1, real.topk(TOPK).indices, 1).sum(0)
    want = switch_load_balancing_loss_func(real, counts, batch.num_tokens, TOPK, EXPERTS, 1.0)
    got = balance_loss(scores, balance().sets(batch), topk=TOPK, group=None) / batch.num_tokens
    assert batch.run_tokens > batch.num_tokens and got == pytest.approx(float(want), rel=1e-6)


def test_equal_shares_give_one():
    scores = torch.eye(EXPERTS).repeat(4, 1)
    sets = TokenSets(torch.ones(1, 4 * EXPERTS), torch.tensor([4.0 * EXPERTS]), torch.ones(1))
    assert balance_loss(scores, sets, topk=1, group=None) == pytest.approx(1.0)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_sequences_are_answers_with_their_prompts(share_prompt):
    batch = pack(share_prompt)
    sizes = balance("seq_aux_loss").sets(batch).sizes.tolist()
    assert sizes == [prompt + answer for prompt, *answers in LENGTHS for answer in answers]
    assert all(part[-1][1] <= batch.num_tokens for part in answer_sequences(batch.segments, batch.num_tokens))


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=5), st.integers(0, 4))
def test_over_sequences_it_does_not_depend_on_packs(lengths, cut):
    """Prompts shared or not, and pairs in one micro-batch or two."""
    shared, whole = pack(True, lengths), pack(False, lengths)
    per_sequence = balance("seq_aux_loss")

    def loss(batch):
        return float(balance_loss(logits_of(batch).softmax(-1), per_sequence.sets(batch), topk=TOPK, group=None))

    assert loss(shared) == pytest.approx(loss(whole), rel=1e-5)
    pairs = random_pairs(lengths, 320)
    halves = [
        pack_pairs(part, share_prompt=True, pad_to_multiple=4, pad_token_id=0) for part in (pairs[:cut], pairs[cut:])
    ]
    assert sum(map(loss, halves)) == pytest.approx(loss(shared), rel=1e-5)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_a_pack_of_padding_adds_nothing(kind):
    batch = pack(True, lengths=[])
    logits = logits_of(batch).requires_grad_()
    loss = balance_loss(logits.softmax(-1), balance(kind).sets(batch), topk=TOPK, group=None)
    assert float(loss) == 0
    loss.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_the_attached_gradient_is_the_losses(kind):
    """Beside the main gradient: coefficient / total weight times that of the loss; nothing on padding."""
    batch, options = pack(True), balance(kind)
    options.start(num_tokens=500, num_pairs=10)
    sets, total = options.sets(batch), 500 if kind == "aux_loss" else 20
    logits = logits_of(batch).requires_grad_()
    probs = logits.softmax(-1)
    attached = options.attach(probs, logits, sets, topk=TOPK, layer_number=2, group=None)
    assert torch.equal(attached, probs)
    (attached**2).sum().backward()
    again = logits_of(batch).requires_grad_()
    loss = balance_loss(again.softmax(-1), sets, topk=TOPK, group=None)
    ((again.softmax(-1) ** 2).sum() + 0.5 * loss / total).backward()
    assert torch.allclose(logits.grad, again.grad, rtol=1e-5, atol=1e-8)
    plain = logits_of(batch).requires_grad_()
    (plain.softmax(-1) ** 2).sum().backward()
    assert torch.equal(logits.grad[batch.num_tokens :], plain.grad[batch.num_tokens :])
    assert not torch.allclose(logits.grad[: batch.num_tokens], plain.grad[: batch.num_tokens], rtol=1e-4)


def test_metrics_are_means_over_layers(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: tensor.mul_(2))  # two ranks, the same sums
    batch, options = pack(True), balance()
    assert balance_metrics([balance("none")], per_layer=True) == {}
    options.start(num_tokens=batch.num_tokens, num_pairs=3)
    logits = logits_of(batch)
    for layer, factor in ((1, 1.0), (2, 2.0), (3, 0.5)):
        options.attach(logits, logits * factor, options.sets(batch), topk=TOPK, layer_number=layer, group=None)
    metrics = balance_metrics([options], per_layer=True)
    layers = [metrics[f"moe_aux_loss_layer_{n}"] for n in range(3)]
    assert len(set(layers)) == 3 and metrics["moe_aux_loss"] == pytest.approx(sum(layers) / 3)
    want = balance_loss((logits * 2).softmax(-1), options.sets(batch), topk=TOPK, group=None) / batch.num_tokens
    assert layers[1] == pytest.approx(2 * float(want), rel=1e-6)
    options.start(num_tokens=1, num_pairs=1)
    assert balance_metrics([options], per_layer=False) == {"moe_aux_loss": 0.0}
