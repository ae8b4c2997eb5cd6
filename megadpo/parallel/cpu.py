"""megatron-core on a machine without CUDA: the one place that redirects its CUDA calls to the CPU.

Active only after an explicit `enable_cpu()`, and refused where CUDA is. Nothing is patched at import. Each redirect
names the megatron-core 0.16.1 call site that needs it, so a later megatron-core can be checked line by line.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "randn", "tensor", "zeros", "zeros_like")
_enabled = False


class _NoStream:
    """Replaces a CUDA stream or event. On a CPU an operation is done when its call returns, so nothing waits."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def record_event(self, *_: Any) -> _NoStream:
        """token_dispatcher.py:895 waits for the event that this returns."""
        return _NoStream()


class _NoFloat8:
    """Replaces Transformer Engine's FP8GlobalStateManager."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def enable_cpu() -> None:
    """Redirect megatron-core's CUDA calls to the CPU for the rest of this process; a second call does nothing.

    Raises RuntimeError where CUDA is available: there, megatron-core must run as it is.
    """
    global _enabled
    if torch.cuda.is_available():
        raise RuntimeError("enable_cpu() is for machines without CUDA; this one has it")
    if _enabled:
        return
    _redirect_devices()
    _redirect_type_names()
    _redirect_streams()
    _redirect_rng()
    # fusions/fused_bias_swiglu.py and others call torch.compile at first use, which on a CPU needs a C++ compiler and
    # takes minutes. Eager mode gives the same results.
    torch.compiler.set_stance("force_eager")
    _patch_megatron_modules()
    _redirect_uneven_collectives()
    _enabled = True


def _to_cpu(device: Any) -> Any:
    return torch.device("cpu") if str(device).startswith("cuda") else device


def _redirect_devices() -> None:
    """`device="cuda"` (schedules.py, clip_grads.py, optimizer.py, grad_scaler.py, state_dict_saver.py),
    `torch.cuda.current_device()` as a device (layers.py, mappings.py, p2p_communication.py, param_and_grad_buffer.py),
    `.cuda()` (tensor_parallel/data.py, grad_scaler.py)."""

    def redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _to_cpu(kwargs["device"])
            return factory(*args, **kwargs)

        return call

    # transformers loads models inside `with torch.device(...)`. That context recognises torch's factory functions by
    # identity, from a list that it makes at first use. So make the list before they are replaced.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, redirected(getattr(torch, name)))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.device_count = lambda: 1  # async_utils.py: rank % device_count()
    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _redirect_type_names() -> None:
    """`param.type() == 'torch.cuda.FloatTensor'`: clip_grads.py:167, optimizer.py:671-700, distrib_optimizer.py:361-582."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]


def _redirect_streams() -> None:
    """Streams, events, synchronisation: distributed_data_parallel.py:230, param_and_grad_buffer.py:417-529,
    p2p_communication.py:242, filesystem_async.py:230, fully_parallel.py:272, token_dispatcher.py:446 and 877-899;
    memory and nvtx: utils.py:2186."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, nothing)
    for name in ("current_stream", "default_stream", "Stream", "Event"):
        setattr(torch.cuda, name, _NoStream)
    torch.cuda.stream = lambda *_, **__: contextlib.nullcontext()  # type: ignore[assignment]
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *_, **__: 0)
    torch.cuda.nvtx.range_push = nothing
    torch.cuda.nvtx.range_pop = nothing
    torch.Tensor.record_stream = nothing  # type: ignore[method-assign]


def _redirect_rng() -> None:
    """Functions of the CUDA generator act on the CPU's: tensor_parallel/random.py (tracker, activation recomputation)."""
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]


def _patch_megatron_modules() -> None:
    """Names that megatron-core's modules imported: replacing them where they are defined would not reach these modules."""
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.core.transformer.moe import token_dispatcher

    # random.py:589-687 asks Transformer Engine about float8 whenever a layer norm is recomputed.
    mcore_random.FP8GlobalStateManager = _NoFloat8
    for name in ("activation_recompute_forward", "fp8_autocast"):
        setattr(mcore_random, name, lambda *_, **__: contextlib.nullcontext())

    # random.py:41-110 uses torch.cuda.default_generators and torch._C._cuda_setRNGState.
    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    # token_dispatcher.py:876-889 makes numpy arrays of split sizes while it copies them off the GPU.
    # torch's all_to_all_single takes no tensors there.
    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes


def _redirect_uneven_collectives() -> None:
    """mappings.py:150 and :200 gather and scatter a different number of rows on each rank (with expert tensor parallelism
    each rank has its own number of tokens). gloo's all_gather and reduce_scatter take equal shapes only."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        x: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(x, group, output_split_sizes, use_global_buffer)
        filled = x.new_zeros(max(output_split_sizes), *x.shape[1:])
        filled[: x.shape[0]] = x
        parts = [torch.empty_like(filled) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, filled, group=group)
        return torch.cat([part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)])

    def scatter(
        x: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(x, group, input_split_sizes, use_global_buffer)
        total = x.contiguous().clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter
