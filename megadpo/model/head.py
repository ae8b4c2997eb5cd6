"""Log-probabilities of given tokens against a vocabulary shard, in chunks, without a tokens x vocabulary tensor."""

from __future__ import annotations

import torch
import torch.distributed as dist


class _VocabParallelLogps(torch.autograd.Function):
    """Forward keeps one number a token (the log of the partition sum); backward computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_start, group, chunk_tokens):  # type: ignore[no-untyped-def]
        local = targets - vocab_start
        mine = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Row 0: log-sum-exp over this shard; row 1: the target's logit where this shard holds it.
        parts = hidden.new_empty((2, hidden.shape[0]), dtype=dtype)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = (hidden[rows] @ weight.t()).to(dtype)
            parts[1, rows] = logits.gather(1, local[rows, None])[:, 0]
            top = logits.amax(dim=1)
            parts[0, rows] = logits.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)
        parts[1].masked_fill_(~mine, 0.0)
        log_sum, target_logit = combine_shards(parts, group)
        ctx.save_for_backward(hidden, weight, local, mine, log_sum)
        ctx.chunk_tokens = chunk_tokens
        return target_logit - log_sum

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden, weight, local, mine, log_sum = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            # d logp[t] / d logits[v] = 1[v = target] - softmax(logits)[v]
            d_logits = (hidden[rows] @ weight.t()).to(log_sum.dtype).sub_(log_sum[rows, None]).exp_()
            d_logits.scatter_add_(1, local[rows, None], -mine[rows, None].to(d_logits.dtype))
            d_logits = d_logits.mul_(-grad[rows, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(d_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(d_logits.t(), hidden[rows])
                else:
                    grad_weight += d_logits.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype) if grad_weight is not None else None, None, None, None, None


def combine_shards(parts: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target's logit over the whole vocabulary, each [A], from this shard's parts [2, A]: its own
    log-sum-exp, and the target's logit or 0 where another shard holds it. Collectives: one all-gather over `group`."""
    if dist.get_world_size(group) == 1:
        return parts[0], parts[1]
    # One collective for all chunks: log-sum-exp is associative, so shards combine afterwards.
    gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, parts, group=group)
    stacked = torch.stack(gathered)
    return stacked[:, 0].logsumexp(dim=0), stacked[:, 1].sum(dim=0)


def vocab_parallel_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup,
    chunk_tokens: int,
) -> torch.Tensor:
    """log softmax(hidden @ full_weight^T)[target], for each row.

    hidden [A, h], the same on every rank of `group`; weight [V/tp, h], this rank's rows of the output matrix, the
    first being token `vocab_start`; targets [A] int64 in the full vocabulary. Returns [A] in nats, float32 (float64
    for float64 input), the same on every rank. At most `chunk_tokens` x V/tp logits exist at a time, in forward and
    backward. Collectives: one all-gather of [2, A] over `group` in forward, none in backward: the gradient of
    `hidden` is this shard's share, to be summed over the group by whatever made `hidden` whole (the backward of
    megatron-core's copy_to or gather_from region).
    """
    return _VocabParallelLogps.apply(hidden, weight, targets, vocab_start, group, chunk_tokens)


def sum_per_answer(token_logps: torch.Tensor, answer_tokens: torch.Tensor) -> torch.Tensor:
    """token_logps [A] in answer order, answer_tokens [2P] int64 with sum A -> [2P] sums, in a fixed order of addition
    (an index_add would make a resumed GPU run differ in the last bits)."""
    if answer_tokens.numel() == 0:
        return token_logps.sum()[None][:0]
    return torch.segment_reduce(token_logps, "sum", lengths=answer_tokens, unsafe=True)
