"""The fused head: matrix products, and two Triton kernels that each read a block of logits once (and write it once).

A softmax of torch's operations would read and write the block five times. With TRITON_INTERPRET=1 set before Triton is
imported, the kernels run on a CPU, slowly; tests do so.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from megadpo.model.heads import combine_shards

BLOCK_COLUMNS = 4096
"""Columns of one step of a kernel: 16 float32 for each thread with 8 warps, in four loads of 16 bytes."""
WARPS = 8


@triton.jit
def _capped(x, CAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """CAP tanh(x / CAP); Triton's language has no tanh."""
    if CAP is not None:
        x = CAP * (2 / (1 + tl.exp(-2 * x / CAP)) - 1)
    return x


@triton.jit
def _fold(logits, targets, top, total, target_logit, begin, columns, BLOCK: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program for each row: updates its maximum, the sum of exponentials relative to it, and the target's logit if it is
    in this block."""
    row = tl.program_id(0).to(tl.int64)  # row x columns can pass 2^31
    start = logits + row * columns
    best = tl.load(top + row)
    mass = tl.load(total + row)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = _capped(tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32), CAP)
        x = tl.where(column < columns, x, float("-inf"))
        larger = tl.maximum(best, tl.max(x, axis=0))
        mass = mass * tl.exp(best - larger) + tl.sum(tl.exp(x - larger), axis=0)
        best = larger
    tl.store(top + row, best)
    tl.store(total + row, mass)
    target = tl.load(targets + row) - begin
    here = (target >= 0) & (target < columns)
    found = _capped(tl.load(start + target, mask=here, other=0.0).to(tl.float32), CAP)
    tl.store(target_logit + row, found, mask=here)


@triton.jit
def _differentiate(logits, out, targets, log_sum, grad, begin, columns, BLOCK: tl.constexpr, CAP: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program for each row and BLOCK columns: (1[column = target] - softmax) times the row's gradient."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = _capped(tl.load(logits + row * columns + column, mask=inside, other=float("-inf")).to(tl.float32), CAP)
    softmax = tl.exp(x - tl.load(log_sum + row))
    is_target = column == tl.load(targets + row) - begin
    slope = tl.where(is_target, 1.0 - softmax, -softmax) * tl.load(grad + row)
    if CAP is not None:
        slope = slope * (1 - (x / CAP) * (x / CAP))
    tl.store(out + row * columns + column, slope.to(out.dtype.element_ty), mask=inside)


def fold_block(
    logits: torch.Tensor,
    targets: torch.Tensor,
    begin: int,
    top: torch.Tensor,
    total: torch.Tensor,
    target_logit: torch.Tensor,
    softcap: float | None = None,
) -> None:
    """Update each row's running numbers with a block of logits, in place.

    logits [A, C], contiguous: columns `begin` to `begin + C` of this shard. targets [A] int64, counted from the shard's
    first row; outside [0, V/tp) if another shard has the target. top, total, target_logit: [A] float32, at first -inf, 0,
    0; after all blocks log-sum-exp is top + log(total). softcap: logits are first softcap x tanh(logit / softcap).
    """
    rows, columns = logits.shape
    _fold[(rows,)](
        logits, targets, top, total, target_logit, begin, columns, BLOCK=BLOCK_COLUMNS, CAP=softcap, num_warps=WARPS
    )


def differentiate_block(
    logits: torch.Tensor,
    out: torch.Tensor,
    targets: torch.Tensor,
    begin: int,
    log_sum: torch.Tensor,
    grad: torch.Tensor,
    softcap: float | None = None,
) -> None:
    """Write the gradient of sum(grad x logps) with respect to a block's logits into `out`.

    logits, targets, begin, softcap: as in `fold_block`. out: [A, C] of any floating dtype; may be `logits`. log_sum [A]
    float32: log-sum-exp over the whole vocabulary. grad [A] float32: the gradient of each row's logp.
    """
    rows, columns = logits.shape
    grid = (rows, triton.cdiv(columns, BLOCK_COLUMNS))
    _differentiate[grid](
        logits, out, targets, log_sum, grad, begin, columns, BLOCK=BLOCK_COLUMNS, CAP=softcap, num_warps=WARPS
    )


def logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    local: torch.Tensor,
    group: dist.ProcessGroup,
    columns: int,
    softcap: float | None = None,
) -> torch.Tensor:
    """LogpsHead.__call__, on blocks of `columns` rows of the weight.

    local: targets [A] counted from the shard's first row. Raises ValueError for a dtype that isn't bfloat16 or float32, or
    two different ones."""
    if hidden.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden {hidden.dtype} and weight {weight.dtype}: expected bfloat16 or float32, both the same"
        )
    result: torch.Tensor = _FusedLogps.apply(hidden.contiguous(), weight, local, group, columns, softcap)
    return result


class _FusedLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, local, group, columns, softcap):  # type: ignore[no-untyped-def]
        rows = hidden.shape[0]
        top = torch.full((rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        total, parts = torch.zeros_like(top), hidden.new_zeros((2, rows), dtype=torch.float32)
        buffer = torch.empty(rows * columns, dtype=torch.float32, device=hidden.device)
        for begin in range(0, weight.shape[0] if rows else 0, columns):
            logits = _project(hidden, weight[begin : begin + columns], buffer)
            fold_block(logits, local, begin, top, total, parts[1], softcap)
        parts[0] = total.log_().add_(top)
        log_sum, target_logit = combine_shards(parts, group)
        ctx.save_for_backward(hidden, weight, local, log_sum)
        ctx.columns, ctx.softcap = columns, softcap
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
            differentiate_block(logits, d_logits, local, begin, log_sum, grad, ctx.softcap)
            if grad_weight is not None:
                torch.mm(d_logits.t(), hidden, out=grad_weight[begin : begin + columns])
            if grad_hidden is not None:
                _add_product(grad_hidden, d_logits, block)
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


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
