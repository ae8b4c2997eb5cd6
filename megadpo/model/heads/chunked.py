"""The head with torch's operations, in chunks of tokens, for every device and dtype."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from megadpo.config.variants import LOGPROB_KERNELS, Lazy
from megadpo.model.heads import LogpsHead, combine_shards

if TYPE_CHECKING:
    import torch
else:
    torch = Lazy("torch")


@LOGPROB_KERNELS.add("torch")
class TorchHead(LogpsHead):
    """Forward saves one number for each token (log-sum-exp); backward computes each chunk's logits again.

    Where DDP keeps the weight's gradient in a buffer (`main_grad`), backward adds each chunk's share to it. A gradient of
    its own would be as large as the weight, and would be there while all activations are still kept.
    """

    name, priority = "torch", 0

    def __call__(self, hidden, weight, targets, *, vocab_start, group, chunk_tokens, softcap=None):  # type: ignore[no-untyped-def]
        return _chunked_logps().apply(hidden, weight, targets, vocab_start, group, chunk_tokens, softcap)


def _forward(ctx, hidden, weight, targets, vocab_start, group, chunk_tokens, softcap):  # type: ignore[no-untyped-def]
    local = targets - vocab_start
    mine = (local >= 0) & (local < weight.shape[0])
    local = local.clamp(0, weight.shape[0] - 1)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # Row 0: log-sum-exp over this shard; row 1: the target's logit if this shard has it.
    parts = hidden.new_empty((2, hidden.shape[0]), dtype=dtype)
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = _logits(hidden[rows], weight, dtype, softcap)
        parts[1, rows] = logits.gather(1, local[rows, None])[:, 0]
        top = logits.amax(dim=1)
        parts[0, rows] = logits.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)
    parts[1].masked_fill_(~mine, 0.0)
    log_sum, target_logit = combine_shards(parts, group)
    ctx.save_for_backward(hidden, weight, local, mine, log_sum)
    ctx.chunk_tokens, ctx.softcap, ctx.parameter = chunk_tokens, softcap, weight
    return target_logit - log_sum


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    hidden, weight, local, mine, log_sum = ctx.saved_tensors
    grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
    grad_weight = main_grad = getattr(ctx.parameter, "main_grad", None)
    if not ctx.needs_input_grad[1]:
        grad_weight = None
    elif main_grad is None:
        grad_weight = torch.zeros_like(weight, dtype=log_sum.dtype)
    for start in range(0, hidden.shape[0], ctx.chunk_tokens):
        rows = slice(start, start + ctx.chunk_tokens)
        # d logp[t] / d logits[v] = 1[v = target] - softmax(logits)[v]
        d_logits = _logits(hidden[rows], weight, log_sum.dtype, ctx.softcap)
        # d c tanh(x / c) / d x = 1 - tanh(x / c)^2
        slope = None if ctx.softcap is None else d_logits.div(ctx.softcap).square_().neg_().add_(1)
        d_logits.sub_(log_sum[rows, None]).exp_()
        d_logits.scatter_add_(1, local[rows, None], -mine[rows, None].to(d_logits.dtype))
        d_logits = d_logits if slope is None else d_logits.mul_(slope)
        d_logits = d_logits.mul_(-grad[rows, None]).to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(d_logits, weight, out=grad_hidden[rows])
        if grad_weight is not None:
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(d_logits.t(), hidden[rows])
            else:
                grad_weight += d_logits.t() @ hidden[rows]
    if grad_weight is not None:
        grad_weight = grad_weight.to(weight.dtype) if main_grad is None else _added(ctx.parameter)
    return grad_hidden, grad_weight, None, None, None, None, None


def _added(weight: torch.Tensor) -> torch.Tensor | None:
    """The gradient that backward returns for a weight whose gradient is already in its `main_grad`."""
    if getattr(weight, "zero_out_wgrad", False):
        return None  # tied: DDP adds the embedding's gradient, which follows
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)  # never read, but with overlap_grad_reduce DDP asserts that there is a gradient


def _logits(hidden, weight, dtype, softcap):  # type: ignore[no-untyped-def]
    logits = (hidden @ weight.t()).to(dtype)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


@functools.cache
def _chunked_logps() -> Any:
    """The autograd function, made at first use, because its base class is torch's."""
    members = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
    return type("ChunkedLogps", (torch.autograd.Function,), members)
