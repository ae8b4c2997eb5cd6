"""The vocabulary-parallel head against log_softmax in float64, and its memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megadpo.model.heads import log_sum_squares, sum_per_answer
from megadpo.model.heads.chunked import TorchHead
from tests.helpers.distributed import run_distributed

ROWS, HIDDEN, VOCAB = 23, 16, 40


def make_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    targets[:6] = torch.tensor([0, 9, 10, 19, 20, 39])  # the ends of shards
    upstream = torch.randn(ROWS, dtype=torch.float64, generator=generator).to(dtype)
    return hidden, weight, targets, upstream


def written_out(softcap):
    hidden, weight, targets, upstream = make_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream)


def on_a_shard(chunk_tokens, softcap):
    hidden, weight, targets, upstream = make_inputs()
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = VOCAB // size
    shard = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    hidden.requires_grad_()
    group = dist.group.WORLD
    options = {"vocab_start": rank * rows, "group": group, "chunk_tokens": chunk_tokens, "softcap": softcap}
    logps = TorchHead()(hidden, shard, targets, **options)
    grad_hidden, grad_shard = torch.autograd.grad(logps, (hidden, shard), upstream)
    dist.all_reduce(grad_hidden)  # as the backward of megatron-core's copy_to region does
    return logps.detach(), grad_hidden, grad_shard


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "chunk_tokens", "softcap"), [(1, 1, None), (1, 7, None), (2, 7, None), (4, 100, None), (2, 7, 3.0)]
)
def test_logps_and_gradients_equal_log_softmax(world_size, chunk_tokens, softcap):
    results = run_distributed(on_a_shard, world_size, chunk_tokens, softcap)
    want_logps, want_hidden, want_weight = written_out(softcap)
    for logps, grad_hidden, _ in results:
        torch.testing.assert_close(logps, want_logps, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_hidden, want_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), want_weight, rtol=1e-11, atol=1e-12)


def with_a_gradient_buffer(tied):
    """What autograd and DDP's buffer get, for a weight whose buffer has ones already."""
    hidden, weight, targets, upstream = make_inputs()
    weight.requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, tied
    seen = []
    weight.register_hook(seen.append)
    options = {"vocab_start": 0, "group": dist.group.WORLD, "chunk_tokens": 7}
    logps = TorchHead()(hidden.requires_grad_(), weight, targets, **options)
    logps.backward(upstream)
    return hidden.grad, weight.main_grad - 1, weight.grad_added_to_main_grad, [grad is None for grad in seen]


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_the_weights_gradient_is_added_to_ddps_buffer(tied):
    """DDP then adds no other: it is told so, or, where the embedding gives one too, it gets none of the head."""
    ((grad_hidden, added, told, seen),) = run_distributed(with_a_gradient_buffer, 1, tied)
    _, want_hidden, want_weight = written_out(None)
    torch.testing.assert_close(grad_hidden, want_hidden, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(added, want_weight, rtol=1e-11, atol=1e-12)
    assert told is not tied and seen == ([True] if tied else [False])


def in_bfloat16():
    """One target's gradient is 256 times the others'. Logits are 0, so that each row's share is half its gradient."""
    hidden = torch.ones(257, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(257, dtype=torch.int64)
    logps = TorchHead()(hidden, weight, targets, vocab_start=0, group=dist.group.WORLD, chunk_tokens=1)
    logps.backward(torch.tensor([256.0] + [1.0] * 256))
    return logps.detach(), weight.grad


@pytest.mark.distributed
def test_bfloat16_is_summed_in_float32():
    """Over the vocabulary, and over chunks: in bfloat16, 128 + 0.5 is 128."""
    ((logps, grad_weight),) = run_distributed(in_bfloat16, 1)
    torch.testing.assert_close(logps, torch.full((257,), -math.log(2)))
    assert grad_weight.dtype == torch.bfloat16 and grad_weight.tolist() == [[256.0], [-256.0]]


def extreme_logits():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    logps = TorchHead()(hidden, weight, torch.tensor([0, 0]), vocab_start=0, group=dist.group.WORLD, chunk_tokens=8)
    logps.sum().backward()
    return logps.detach(), hidden.grad, weight.grad


@pytest.mark.distributed
def test_extreme_logits_stay_finite():
    ((logps, grad_hidden, grad_weight),) = run_distributed(extreme_logits, 1)
    torch.testing.assert_close(logps, torch.tensor([0.0, -2e4]))
    assert grad_hidden.isfinite().all() and grad_weight.isfinite().all()


def peak_of_big_head():
    """Bytes by which the resident set grows at most, for a problem whose full logits would take 256 MB."""
    import resource

    rows, hidden_size, vocab, chunk = 4096, 32, 16384, 128
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logps = TorchHead()(hidden, weight, targets, vocab_start=0, group=dist.group.WORLD, chunk_tokens=chunk)
    logps.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


@pytest.mark.distributed
def test_no_tokens_by_vocabulary_tensor():
    (grown,) = run_distributed(peak_of_big_head, 1)
    full_logits = 4096 * 16384 * 4
    assert grown < full_logits / 2  # a chunk is 8 MB, in a few copies; torch's first products take up to 85 MB in all


def test_sum_per_answer_keeps_empty_packs_differentiable():
    logps, none = torch.randn(0, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    out = sum_per_answer(logps, torch.zeros(1, dtype=torch.int64), none, none)
    assert out.shape == (0,)
    out.sum().backward()


def test_answers_are_summed_over_the_segments_that_they_go_through():
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    # prompt | begin | rest of 0 | rest of 1, none of it in the loss | answer 2
    segments, paths = torch.tensor([0, 2, 1, 0, 2]), torch.tensor([0, 1, 2, 0, 1, 3, 0, 4])
    out = sum_per_answer(logps, segments, paths, torch.tensor([3, 3, 2]))
    assert out.tolist() == [7.0, 3.0, 24.0]
    (out * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert logps.grad.tolist() == [11.0, 11.0, 1.0, 100.0, 100.0]


def test_a_long_answer_loses_nothing():
    logps = -4 * torch.rand(32768, generator=torch.Generator().manual_seed(0))
    (total,) = sum_per_answer(logps, torch.tensor([0, 32768]), torch.tensor([0, 1]), torch.tensor([2]))
    exact = logps.double().sum()
    assert total == exact.float()  # one rounding; added up in float32 it is 0.03 off


def squares_on_a_shard(chunk_tokens, scale):
    hidden, weight, *_ = make_inputs()
    rank, rows = dist.get_rank(), VOCAB // dist.get_world_size()
    shard = weight[rank * rows : (rank + 1) * rows]
    return log_sum_squares(hidden * scale, shard, group=dist.group.WORLD, chunk_tokens=chunk_tokens)


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "chunk_tokens", "scale"), [(1, 7, 1), (2, 100, 1), (2, 5, 300)])
def test_the_sum_of_squared_probabilities(world_size, chunk_tokens, scale):
    """scale 300: probabilities whose squares underflow."""
    hidden, weight, *_ = make_inputs()
    want = (2 * (scale * hidden @ weight.T).log_softmax(-1)).logsumexp(-1)
    for found in run_distributed(squares_on_a_shard, world_size, chunk_tokens, scale):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)
