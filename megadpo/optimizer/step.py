"""One optimizer step that leaves the weights alone when the gradients are not finite."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import local_multi_tensor_l2_norm

NORM_BLOCK = 2**11
"""Elements of a tensor whose squares are added up in float32 on a CPU: at most 7e-7 of a block's norm is lost."""


def use_our_norm() -> None:
    """For the rest of the process, where there is no Transformer Engine or apex. megatron-core then reads the norm of every
    parameter's gradient off the GPU by itself (utils.py `local_multi_tensor_l2_norm`), and has torch add up a whole tensor
    in float32, which on a CPU loses 1.5% of the norm at 1.4e8 elements."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together, [1] on their device, where it stays: what multi_tensor_l2norm gives. Within 1e-6 of
    the exact one: torch's kernel for a GPU adds up in a tree, and its kernel for a CPU gets blocks."""
    if tensors[0][0].is_cuda:
        return torch.nn.utils.get_total_norm(tensors[0]).reshape(1), None
    norms = [norm for tensor in tensors[0] for norm in _norms_of_blocks(tensor.flatten())]
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float().reshape(1), None


def _norms_of_blocks(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of each whole block of a tensor [n], and [1] of what is left."""
    end = flat.numel() // NORM_BLOCK * NORM_BLOCK
    whole = torch.linalg.vector_norm(flat[:end].view(-1, NORM_BLOCK), dim=1)
    return whole, torch.linalg.vector_norm(flat[end:]).reshape(1)


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
