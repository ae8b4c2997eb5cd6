"""One optimizer step that leaves the weights alone when the gradients are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import local_multi_tensor_l2_norm


def use_norm_without_waits() -> None:
    """For the rest of the process: without Transformer Engine or apex, megatron-core reads the norm of every parameter's
    gradient off the GPU by itself (utils.py `local_multi_tensor_l2_norm`)."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together, [1] on their device, where it stays: what multi_tensor_l2norm gives."""
    return torch.nn.utils.get_total_norm(tensors[0]).reshape(1), None


@torch.no_grad()
def guarded_step(optimizer: MegatronOptimizer) -> tuple[float, bool]:
    """Clip and update; returns the gradient norm before clipping, and whether the weights were updated.

    megatron-core's own `step` looks for infinities only with a float16 loss scaler, and otherwise writes NaN into the
    weights; this is the same sequence with a look at the norm in between. Collectives: the norm's all-reduce over the
    model-parallel (with the distributed optimizer: also data-parallel) ranks, and the parameters' all-gather.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm, False
    for part in parts:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                # The precision-aware optimizer's gradients have a place of their own; `grad` is None there.
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
    return grad_norm, True
