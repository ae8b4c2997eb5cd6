"""The two passes over a block of logits that the fused head makes, each one read (and one write) of it, in Triton.

Written apart from torch's operations because a softmax built from those reads and writes the block five times over.
Imports Triton: import this where it is chosen (model/head_choice.py). With TRITON_INTERPRET=1 set before Triton
is imported, the kernels run on a CPU, slowly, as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_COLUMNS = 4096
"""Columns that one step of a kernel holds: 16 float32 a thread with 8 warps, which is four loads of 16 bytes."""
WARPS = 8


@triton.jit
def _fold(logits, targets, top, total, target_logit, begin, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program a row: running maximum, sum of exponentials relative to it, and the target's logit if it is here."""
    row = tl.program_id(0).to(tl.int64)  # row x columns can pass 2^31
    start = logits + row * columns
    best = tl.load(top + row)
    mass = tl.load(total + row)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(best, tl.max(x, axis=0))
        mass = mass * tl.exp(best - larger) + tl.sum(tl.exp(x - larger), axis=0)
        best = larger
    tl.store(top + row, best)
    tl.store(total + row, mass)
    target = tl.load(targets + row) - begin
    here = (target >= 0) & (target < columns)
    found = tl.load(start + target, mask=here, other=0.0).to(tl.float32)
    tl.store(target_logit + row, found, mask=here)


@triton.jit
def _differentiate(logits, out, targets, log_sum, grad, begin, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program a row and BLOCK columns: d logp / d logit = 1[column = target] - softmax, times the row's gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(logits + row * columns + column, mask=inside, other=float("-inf")).to(tl.float32)
    softmax = tl.exp(x - tl.load(log_sum + row))
    is_target = column == tl.load(targets + row) - begin
    slope = tl.where(is_target, 1.0 - softmax, -softmax) * tl.load(grad + row)
    tl.store(out + row * columns + column, slope.to(out.dtype.element_ty), mask=inside)


def fold_block(
    logits: torch.Tensor,
    targets: torch.Tensor,
    begin: int,
    top: torch.Tensor,
    total: torch.Tensor,
    target_logit: torch.Tensor,
) -> None:
    """Take a block of logits into each row's running figures, in place.

    logits [A, C], contiguous: columns `begin` to `begin + C` of this shard; targets [A] int64, counted from the shard's
    first row, outside [0, V/tp) where another shard has it. top, total, target_logit: [A] float32, at first -inf, 0, 0;
    after all blocks log-sum-exp is top + log(total).
    """
    rows, columns = logits.shape
    _fold[(rows,)](logits, targets, top, total, target_logit, begin, columns, BLOCK=BLOCK_COLUMNS, num_warps=WARPS)


def differentiate_block(
    logits: torch.Tensor,
    out: torch.Tensor,
    targets: torch.Tensor,
    begin: int,
    log_sum: torch.Tensor,
    grad: torch.Tensor,
) -> None:
    """Write the gradient of sum(grad x logps) by the logits of a block into `out`.

    logits, targets, begin: as in `fold_block`; out: [A, C] in any floating dtype, may be `logits` itself; log_sum, grad:
    [A] float32, the log of the partition sum over the whole vocabulary and what each row's logp is weighted by.
    """
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, BLOCK_COLUMNS))
    _differentiate[grid](logits, out, targets, log_sum, grad, begin, columns, BLOCK=BLOCK_COLUMNS, num_warps=WARPS)
