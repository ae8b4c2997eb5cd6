"""A pretend world: one process acts as one rank of any layout, without other processes and without memory for tensors.

Collectives return at once and change nothing, and megatron-core makes its tensors on the meta device. So a laptop can
build a rank of a 512-rank layout of a 70B model, and run its forward and backward.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megadpo.config.grid import Grid
from megadpo.parallel.cpu import enable_cpu
from megadpo.parallel.groups import ParallelContext, destroy, initialize

META = torch.device("meta")


@contextlib.contextmanager
def pretend_rank(grid: Grid) -> Iterator[ParallelContext]:
    """The context of the grid's rank, on the meta device. No process is started, nothing is sent.

    Raises RuntimeError inside a real world. Without CUDA, megatron-core stays redirected to the CPU afterwards
    (parallel/cpu.py); everything else is restored.
    """
    # registers the "fake" backend, which torch ships for its own tests
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a pretend world needs a process without process groups; this one has joined a real world")
    if not torch.cuda.is_available():
        enable_cpu()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _megatron_on_meta():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames collectives that megatron-core calls
        dist.init_process_group("fake", store=FakeStore(), rank=grid.rank, world_size=grid.world_size)
        try:
            parallel = initialize(grid, META)
            model_parallel_cuda_manual_seed(0)  # layers read the generator's state even if they draw no random number
            yield parallel
        finally:
            destroy()


def gather_buffers() -> list[torch.Tensor]:
    """megatron-core's buffers of gathered tokens, which it makes once and uses again."""
    return list(parallel_state.get_global_memory_buffer().buffer.values())


@contextlib.contextmanager
def _megatron_on_meta() -> Iterator[None]:
    """`torch.cuda.current_device()` is where megatron-core makes parameters and buffers (layers.py,
    param_and_grad_buffer.py); `param.type()` is compared with names of CUDA types (optimizer.py, distrib_optimizer.py)."""
    current_device, type_name = torch.cuda.current_device, torch.Tensor.type
    torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
    torch.Tensor.type = _without_meta(type_name)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.cuda.current_device = current_device
        torch.Tensor.type = type_name  # type: ignore[method-assign]


def _without_meta(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = original(self, dtype, *args, **kwargs)
        return f"torch.cuda.{name.rsplit('.', 1)[-1]}" if dtype is None and ".meta." in name else name

    return type_name
