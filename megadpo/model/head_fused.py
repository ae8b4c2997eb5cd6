"""The vocabulary-parallel head for GPUs: matrix products on blocks of the vocabulary, one fused pass over each block.

Blocks are cut from the vocabulary, with all answer tokens in each, and not from the tokens: then a block's rows of the
weight's gradient come out of one product and need no accumulator of the weight's size in float32.

Costs, with A answer tokens, this rank's V rows of the weight, hidden size h and blocks of C columns:

    forward    one product of 2 A V h operations; A V float32 logits written and read once
    backward   three such products; logits written and read again, their gradients in the hidden dtype likewise; the
               gradient of `hidden` read and written V / C times in float32
    memory     A C float32 and A C of the hidden dtype, with A C at most MOST_LOGITS, and A h float32: whatever V is
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from megadpo.model.head import combine_shards
from megadpo.model.head_triton import differentiate_block, fold_block

MOST_LOGITS = 1 << 27
"""Logits that exist at a time: 512 MiB in float32, beside 256 MiB of gradients in bfloat16."""
COLUMN_MULTIPLE = 128
"""Blocks are whole tiles of a matrix product, and no thinner than one."""


class _FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, local, group, columns):  # type: ignore[no-untyped-def]
        rows = hidden.shape[0]
        top = torch.full((rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        total, parts = torch.zeros_like(top), hidden.new_zeros((2, rows), dtype=torch.float32)
        buffer = torch.empty(rows * columns, dtype=torch.float32, device=hidden.device)
        for begin in range(0, weight.shape[0] if rows else 0, columns):
            logits = _project(hidden, weight[begin : begin + columns], buffer)
            fold_block(logits, local, begin, top, total, parts[1])
        parts[0] = total.log_().add_(top)
        log_sum, target_logit = combine_shards(parts, group)
        ctx.save_for_backward(hidden, weight, local, log_sum)
        ctx.columns = columns
        return target_logit - log_sum

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden, weight, local, log_sum = ctx.saved_tensors
        rows, columns, grad = hidden.shape[0], ctx.columns, grad.contiguous()
        buffer = torch.empty(rows * columns, dtype=torch.float32, device=hidden.device)
        slopes = buffer if hidden.dtype == torch.float32 else torch.empty_like(buffer, dtype=hidden.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if grad_weight is not None and not rows:
            grad_weight.zero_()
        for begin in range(0, weight.shape[0] if rows else 0, columns):
            block = weight[begin : begin + columns]
            logits = _project(hidden, block, buffer)
            d_logits = slopes[: logits.numel()].view_as(logits)
            differentiate_block(logits, d_logits, local, begin, log_sum, grad)
            if grad_weight is not None:
                torch.mm(d_logits.t(), hidden, out=grad_weight[begin : begin + columns])
            if grad_hidden is not None:
                _add_product(grad_hidden, d_logits, block)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def fused_vocab_parallel_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_start: int,
    group: dist.ProcessGroup,
    chunk_tokens: int,
) -> torch.Tensor:
    """What `vocab_parallel_logps` gives, for bfloat16 and float32, with logits in float32 throughout.

    Shapes, result and collectives are that function's. At most MOST_LOGITS and at most chunk_tokens x V/tp logits exist
    at a time (or COLUMN_MULTIPLE a token, where that is more). Never waits for the device.
    Raises ValueError for another dtype, or hidden and weight of two.
    """
    if hidden.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden {hidden.dtype} and weight {weight.dtype}: expected bfloat16 or float32, both the same"
        )
    columns = block_columns(hidden.shape[0], weight.shape[0], chunk_tokens)
    return _FusedLogps.apply(hidden.contiguous(), weight, targets - vocab_start, group, columns)


def block_columns(rows: int, vocab: int, chunk_tokens: int) -> int:
    """Rows of the weight that are projected at a time, for `rows` tokens: as many as memory allows, in whole tiles."""
    most = min(MOST_LOGITS, chunk_tokens * vocab) // max(rows, 1)
    return min(vocab, max(1, most // COLUMN_MULTIPLE) * COLUMN_MULTIPLE)


def _project(hidden: torch.Tensor, block: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """hidden [A, h] @ block [C, h]^T in float32, [A, C] at the beginning of `buffer`."""
    out = buffer[: hidden.shape[0] * block.shape[0]].view(hidden.shape[0], block.shape[0])
    if hidden.dtype == torch.float32:
        return torch.mm(hidden, block.t(), out=out)
    if hidden.is_cpu:  # tests only: CPUs have no product of mixed dtypes
        return torch.mm(hidden.float(), block.t().float(), out=out)
    return torch.mm(hidden, block.t(), out_dtype=torch.float32, out=out)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [A, h] float32 += a [A, C] @ b [C, h], summed in float32."""
    if a.dtype == torch.float32 or a.is_cpu:
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@functools.cache
def multiplies_into_float32(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices into a float32 one on this device, and adds to it, unrounded between.

    CUDA builds do from 2.10 on (https://github.com/pytorch/pytorch/pull/167931); others refuse. Waits for the device.
    """
    a = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    b = a.clone().fill_diagonal_(256.0)
    total = torch.full((16, 16), 2.0**-10, device=device)
    try:
        product = torch.mm(a, b, out_dtype=torch.float32, out=torch.empty_like(total))
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # refused, or no such argument
        return False
    return bool((product == 271.0).all() & (total == 271.0 + 2.0**-10).all())  # neither is a bfloat16
