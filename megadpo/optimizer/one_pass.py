"""Transformer Engine's FusedAdam with a step in which a Triton kernel reads and writes everything once.

It is for bfloat16 weights with a 16-bit remainder; both together are the float32 weight. With a float32 gradient and bfloat16
moments it moves 20 bytes per parameter. FusedAdam before 2.13 moves 60: it copies each moment to float32, updates the copy,
rounds it to a second copy, and copies that back (see slices.py). From 2.13 on it moves 20 as well.

State, its names and dtypes, and so checkpoints, are FusedAdam's. The formula and its order are those of
`AdamFunctorMasterParamRemainder` in TransformerEngine/common/multi_tensor/adam.cu, in float32. Products and sums are not
fused here, so a GPU and Triton's interpreter give the same bits; Transformer Engine's compiler may fuse them, which
changes the last bit.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 2048
"""Elements of one program: 8 for each thread, which loads 16 bytes of bfloat16 at once, or of float32 twice."""
WARPS = 8


@triton.jit
def _load(pointer, index, inside):  # type: ignore[no-untyped-def]
    """Loads float32, from float32 or from bfloat16's bits."""
    x = tl.load(pointer + index, mask=inside, other=0)
    if pointer.dtype.element_ty == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _store(pointer, index, x, inside):  # type: ignore[no-untyped-def]
    """Stores float32, or bfloat16's bits, rounded to the nearest, ties to even, as torch rounds. (The interpreter's own
    conversion truncates.)"""
    if pointer.dtype.element_ty == tl.int16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where(x == x, rounded, 0x7FC0).to(tl.int16)
    tl.store(pointer + index, x, mask=inside)


@triton.jit
def _update(  # type: ignore[no-untyped-def]
    grad, weight, remainder, exp_avg, exp_avg_sq, count, lr, beta1, beta2, eps, decay, unbias1, unbias2,
    BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """Updates the BLOCK elements from `program x BLOCK` on. weight and remainder: int16, the two halves of the float32 weight's
    bits; the upper half is one higher if the lower one begins with 1. The others: float32, or int16 for bfloat16's bits."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # can be larger than 2^31
    inside = index < count
    g = _load(grad, index, inside)
    upper = tl.load(weight + index, mask=inside, other=0).to(tl.int32)
    lower = tl.load(remainder + index, mask=inside, other=0).to(tl.int32)
    upper = tl.where(lower < 0, upper - 1, upper)
    p = ((upper << 16) | (lower & 0xFFFF)).to(tl.float32, bitcast=True)

    m = beta1 * _load(exp_avg, index, inside) + (1 - beta1) * g
    v = beta2 * _load(exp_avg_sq, index, inside) + (1 - beta2) * g * g
    root = tl.sqrt_rn(tl.div_rn(v, unbias2)) + eps
    p = p - lr * (tl.div_rn(tl.div_rn(m, unbias1), root) + decay * p)

    bits = p.to(tl.int32, bitcast=True)
    lower = bits.to(tl.int16)
    upper = tl.where(lower < 0, (bits >> 16) + 1, bits >> 16)
    tl.store(weight + index, upper.to(tl.int16), mask=inside)
    tl.store(remainder + index, lower, mask=inside)
    _store(exp_avg, index, m, inside)
    _store(exp_avg_sq, index, v, inside)


def update(
    grad: torch.Tensor,
    weight: torch.Tensor,
    state: dict[str, torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool,
    step: int,
) -> None:
    """AdamW's `step`-th update of one parameter, in place; on a GPU it is only queued.

    grad [n]: float32 or bfloat16; weight [n]: bfloat16; state: `master_param` [n] int16, the remainder, and the moments
    `exp_avg` and `exp_avg_sq` [n], each float32 or bfloat16. All contiguous. Raises ValueError for other dtypes.
    """
    tensors = grad, weight, state["master_param"], state["exp_avg"], state["exp_avg_sq"]
    narrow, either = (torch.bfloat16,), (torch.bfloat16, torch.float32)
    for tensor, dtypes in zip(tensors, (either, narrow, (torch.int16,), either, either), strict=True):
        if tensor.dtype not in dtypes or not tensor.is_contiguous():
            expected = " or ".join(map(str, dtypes))
            raise ValueError(f"{tensor.dtype}, contiguous {tensor.is_contiguous()}: expected {expected}, contiguous")
    count, (beta1, beta2) = weight.numel(), map(_in_float32, betas)
    if count == 0:  # a grid of no programs can't be launched
        return
    unbias1, unbias2 = ((1 - beta**step) if bias_correction else 1.0 for beta in (beta1, beta2))
    numbers = [float(number) for number in (lr, beta1, beta2, eps, weight_decay, unbias1, unbias2)]
    views = [tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor for tensor in tensors]
    grid = (triton.cdiv(count, BLOCK),)
    _update[grid](*views, count, *numbers, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)


def _in_float32(number: float) -> float:
    """The number that the kernel gets. FusedAdam computes the bias correction from it, in float64."""
    return ctypes.c_float(number).value


def in_one_pass(fused: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """FusedAdam (`fused`) with this step. The class keeps its name, which is in checkpoints, so each reads the other's."""
    return type(fused.__name__, (_InOnePass, fused), {"__module__": fused.__module__})


class _InOnePass:
    """Mixin, to be named before FusedAdam in the base classes. For FusedAdam with remainders, as AdamW."""

    param_groups: list[dict[str, Any]]
    state: dict[torch.Tensor, dict[str, torch.Tensor]]
    initialize_state: Callable[[torch.Tensor, bool], None]
    adam_w_mode: int

    @torch.no_grad()
    def step(self) -> None:
        """One launch for each parameter. Like FusedAdam, counts the steps of each group that has parameters, and doesn't change
        parameters without a gradient."""
        assert self.adam_w_mode == 1, "the decay is AdamW's"
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "bias_correction", "step")}
            for parameter in group["params"]:
                if len(self.state[parameter]) == 0:
                    self.initialize_state(parameter, True)  # with a remainder
                if parameter.decoupled_grad is not None:
                    update(parameter.decoupled_grad, parameter, self.state[parameter], **options)
