"""One optimizer step in two parts: the norm of the gradients, and the update. The caller leaves out the update if a number is
not finite."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, clip_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import local_multi_tensor_l2_norm

NORM_BLOCK = 2**11
"""On a CPU the squares of this many elements are summed in float32. The relative error of a block's norm is below 7e-7."""


def use_our_norm_and_scale() -> None:
    """Replaces two functions of megatron-core in this process if there is neither Transformer Engine nor apex. Its norm
    copies the norm of every parameter's gradient from the GPU separately (utils.py `local_multi_tensor_l2_norm`), and sums
    a whole tensor in float32; on a CPU the norm of 1.4e8 elements is then 1.5% too small. Its scaling copies each gradient
    (`local_multi_tensor_scale`)."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
        clip_grads.multi_tensor_scale_impl = _scale


def _scale(chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], scale: float) -> None:
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, scale, out=target)


def _l2_norm(
    chunk_size: int, flag: torch.Tensor, tensors: list[list[torch.Tensor]], per_tensor: bool, *_: Any
) -> tuple[torch.Tensor, None]:
    """The norm of all tensors together, [1] on their device, as multi_tensor_l2norm gives it. The relative error is below
    1e-6: torch's GPU kernel sums in a tree, and its CPU kernel gets blocks."""
    if tensors[0][0].is_cuda:
        return torch.nn.utils.get_total_norm(tensors[0]).reshape(1), None
    norms = [norm for tensor in tensors[0] for norm in _norms_of_blocks(tensor.flatten())]
    return torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float64).float().reshape(1), None


def _norms_of_blocks(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The norms of all whole blocks of a tensor [n], and [1] the norm of the rest."""
    end = flat.numel() // NORM_BLOCK * NORM_BLOCK
    whole = torch.linalg.vector_norm(flat[:end].view(-1, NORM_BLOCK), dim=1)
    return whole, torch.linalg.vector_norm(flat[end:]).reshape(1)


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Prepare the gradients for `update`; returns their norm before clipping. Waits for the device. Collectives: an all-reduce
    over the model-parallel (with the distributed optimizer: also data-parallel) ranks."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip with the norm from `gradient_norm`, and update the weights. On a GPU this is only queued.

    megatron-core's `step` is the same, but checks for infinities only with a float16 loss scaler; otherwise it writes NaN
    into the weights. Collectives: the parameters' all-gather.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        parameters = part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=grad_norm,
                # The precision-aware optimizer has its gradients elsewhere; `grad` is None
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()
