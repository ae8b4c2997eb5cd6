"""A pretend GPU: `device="cuda"` on a machine without one, so that a step's devices and waits can be seen without CUDA.

torch's meta device plays the GPU. Its tensors have shapes and dtypes but no memory, and here they answer to the name of
cuda:0. CPU tensors are real, as they are beside a GPU. What a GPU would refuse raises `WrongDevice`; what would make the
host wait for it is written down in `FakeCuda.waits` and answered with ones. `install` changes torch for good: call it in
a process of its own (tests/helpers/distributed.py), before megadpo sets up its device.

torch's own FakeTensorMode does the first half, but no backward on a build without CUDA, whose device guard autograd wants.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten

# What the host waits for on a GPU: its result is a number for Python, or its shape depends on values.
_NAMES = (
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim unique_consecutive equal bincount repeat_interleave"
)
WAITING = {getattr(aten, name) for name in _NAMES.split()}
# Arguments on two devices: copies by design; these take a number from the CPU, as whatever is tagged pointwise does.
TWO_DEVICES = {aten.copy_, aten._to_copy, aten.set_}
_NAMES = "_foreach_add_ _foreach_mul_ _foreach_div_ index_put_ _index_put_impl_ fill_"
NUMBERS = {getattr(aten, name) for name in _NAMES.split()}
# Collectives that torch has no pretence of on meta tensors.
_NAMES = "allreduce_coalesced_ reduce_scatter_tensor_coalesced_ allgather_into_tensor_coalesced_"
COALESCED = {getattr(torch.ops.c10d, name) for name in _NAMES.split()}


class WrongDevice(RuntimeError):
    """An operation that a GPU refuses: arguments on two devices, or a CPU tensor in a collective of NCCL's."""


@dataclass
class FakeCuda(TorchDispatchMode):
    """Active inside `with`. answers: operation -> what gives its result instead (None: the operation itself does)."""

    answers: dict[Any, Callable[..., Any]] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)
    """Where the host waited, in order: `file.py:function` of the nearest code of megadpo or megatron-core."""

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = _named_device(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        if func.namespace == "c10d":
            _check_collective(func, args, tensors)
            if func.overloadpacket in COALESCED:
                return FakeWork().boxed()
        elif on_gpu and func.overloadpacket not in TWO_DEVICES:
            _check_devices(func, [tensor for tensor in tensors if not tensor.is_cuda])
        if func in self.answers:
            with _own_names():
                answer = self.answers[func](*args, **kwargs)
            if answer is not None:
                self.wait()
                return answer
        if func is aten._to_copy.default and (on_gpu or kwargs.get("device") == META):
            return self._copied(args[0], kwargs)
        if func is aten.copy_.default and args[0].is_cuda != args[1].is_cuda:
            return self._copy(args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if on_gpu and (func.overloadpacket in WAITING or _indexes_by_mask(func, args)):
            self.wait()
            if func is aten._local_scalar_dense.default:
                return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        with _own_names():
            return func(*tree_map(_named, args), **kwargs)

    def wait(self) -> None:
        self.waits.append(place())

    def _copied(self, tensor: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        to_gpu = options["device"] == META if options.get("device") is not None else tensor.is_cuda
        if not to_gpu:
            self.wait()  # into memory that isn't pinned, or to be read at once: nothing of megadpo's does otherwise
            return torch.ones(tensor.shape, dtype=options.get("dtype") or tensor.dtype)
        if not tensor.is_cuda and not (options.get("non_blocking") and tensor.is_pinned()):
            self.wait()
        return torch.empty_like(tensor, dtype=options.get("dtype"), device=META)

    def _copy(self, into: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        assert into.shape == torch.broadcast_shapes(into.shape, source.shape), (into.shape, source.shape)
        if not (non_blocking and (source if into.is_cuda else into).is_pinned()):
            self.wait()
        return into if into.is_cuda else into.fill_(1)


def place() -> str:
    """`file.py:function` of the innermost frame in megadpo or megatron-core."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        named = not frame.f_code.co_name.startswith("<")
        if named and {"megadpo", "megatron"} & set(path.parts[-5:-1]):
            return f"{path.name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


_own_name = False


@contextlib.contextmanager
def _own_names() -> Iterator[None]:
    """Inside, meta tensors say that they are: torch computes the shapes of results by Python code that asks."""
    global _own_name
    before, _own_name = _own_name, True
    try:
        yield
    finally:
        _own_name = before


def _named(value: Any) -> Any:
    """CUDA by the name that torch knows it by here."""
    if isinstance(value, torch.device):
        return META if value.type == "cuda" else value
    return META if isinstance(value, str) and value.startswith("cuda") else value


def _named_device(options: dict[str, Any]) -> dict[str, Any]:
    return {key: _named(value) if key == "device" else value for key, value in options.items()}


def _check_devices(func: Any, on_cpu: list[torch.Tensor]) -> None:
    """CUDA takes a number from a CPU tensor where an operation goes element by element, and nowhere else."""
    numbers = torch.Tag.pointwise in func.tags or func.overloadpacket in NUMBERS
    if any(tensor.dim() > 0 or not numbers for tensor in on_cpu):
        raise WrongDevice(f"{func} has arguments on cuda:0 and on the CPU ({[tuple(t.shape) for t in on_cpu]})")


def _indexes_by_mask(func: Any, args: Any) -> bool:
    """Indexing by truth values counts them first, but for `x[mask] = number`, which is masked_fill."""
    if func.overloadpacket not in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
        return False
    masks = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return masks and not (len(args) > 2 and args[2].numel() == 1)


# ---- what torch and its process groups have to be told

_gloo_groups: set[str] = set()
_chosen: list[torch.device] = []  # by set_device
_rank, _world_size = 0, 1


def _check_collective(func: Any, args: Any, tensors: Iterable[torch.Tensor]) -> None:
    if func.overloadpacket is torch.ops.c10d.barrier:
        return
    boxes = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
    group = dist.ProcessGroup.unbox(boxes[0])
    cuda = group.group_name not in _gloo_groups
    if any(tensor.is_cuda != cuda for tensor in tensors):
        raise WrongDevice(
            f"{func} of {'a CPU' if cuda else 'a CUDA'} tensor in a group of {'nccl' if cuda else 'gloo'}"
        )


def install() -> None:
    """CUDA is there, one GPU of it, and NCCL: a pretend world, in which collectives return at once."""
    torch.compiler.set_stance("force_eager")
    _install_tensors()
    _install_runtime()
    _install_groups()


def be(rank: int, world_size: int) -> None:
    """Whom the next `init_process_group` makes this process."""
    global _rank, _world_size
    _gloo_groups.clear()
    _rank, _world_size = rank, world_size


def _install_tensors() -> None:
    device, type_name, base = torch.Tensor.device, torch.Tensor.type, torch._C.TensorBase
    address, is_meta = torch.UntypedStorage.data_ptr, torch.Tensor.is_meta
    torch.Tensor.device = property(
        lambda self: CUDA if is_meta.__get__(self) and not _own_name else device.__get__(self)
    )
    torch.Tensor.is_cuda = property(lambda self: is_meta.__get__(self))
    torch.Tensor.type = lambda self, *args: (
        base.type(self, *args) if args else type_name(self).replace(".meta.", ".cuda.")
    )
    # where storages without memory begin: code tells views of one tensor from others' by it
    torch.UntypedStorage.data_ptr = lambda self: id(self) if self.device == META else address(self)
    torch.Tensor.is_pinned = lambda self, *_: getattr(self, "_pinned", False)
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.record_stream = lambda self, stream: None
    to, make = torch.Tensor.to, torch.tensor
    # by the name that C++ compares, so that what is there already isn't copied
    torch.Tensor.to = lambda self, *args, **options: to(self, *map(_named, args), **_named_device(options))
    torch.Tensor.cuda = lambda self, *_, **options: self.to(CUDA, **options)

    def tensor(data: Any, *, device: Any = None, requires_grad: bool = False, **options: Any) -> torch.Tensor:
        data = tree_map(
            lambda value: value.item() if isinstance(value, torch.Tensor) and value.is_cuda else value, data
        )
        made = make(data, **options)  # on the CPU, then copied, and the copy waited for
        return (made if device is None else made.to(device)).requires_grad_(requires_grad)

    torch.tensor = tensor


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    assert not tensor.is_cuda, "only CPU memory can be pinned"
    copy = tensor.clone()
    copy._pinned = True
    return copy


class _Stream:
    """Streams and events: nothing is ever under way."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _waits if name in ("synchronize", "elapsed_time") else lambda *_, **__: self

    def is_capturing(self) -> bool:
        """Asked by torch's optimizers where torch was built with CUDA."""
        return False


def _waits(*_: Any, **__: Any) -> None:
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    if isinstance(mode := _get_current_dispatch_mode(), FakeCuda):
        mode.wait()


def _install_runtime() -> None:
    cuda = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 1
    cuda._lazy_init, cuda.is_initialized = lambda: None, lambda: True
    cuda.set_device = _chosen.append
    cuda.current_device = lambda: CUDA
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.synchronize = _waits
    cuda.Stream = cuda.Event = cuda.current_stream = cuda.default_stream = _Stream
    torch.accelerator.current_stream = _Stream
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.empty_cache = cuda.manual_seed = cuda.manual_seed_all = lambda *_: None
    from megatron.core.tensor_parallel import random

    for owner, name in ((cuda, "{}_rng_state"), (cuda.random, "{}_rng_state"), (random, "_{}_cuda_rng_state")):
        setattr(owner, name.format("get"), lambda *_, **__: torch.get_rng_state())
        setattr(owner, name.format("set"), lambda *_, **__: None)


def _install_groups() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init, new_group = dist.init_process_group, dist.new_group

    def pretend_world(backend: str, *, device_id: torch.device | None = None, **_: Any) -> None:
        assert backend == "nccl" and _chosen[-1:] == [CUDA], "set_device comes first, and then NCCL"
        assert device_id == CUDA, "a barrier would have to guess the GPU, and groups would connect at their first use"
        init("fake", store=FakeStore(), rank=_rank, world_size=_world_size)

    def pretend_group(*args: Any, backend: str | None = None, **options: Any) -> Any:
        group = new_group(*args, **{**options, "backend": "fake", "pg_options": None})
        if backend == "gloo" and isinstance(group, dist.ProcessGroup):
            _gloo_groups.add(group.group_name)
        return group

    def all_gather_object(objects: list[Any], own: Any, group: Any = None) -> None:
        _waits()
        objects[:] = [own] * len(objects)

    dist.init_process_group, dist.new_group = pretend_world, pretend_group
    # with NCCL they go by the GPU that set_device has named; nobody is there to say what rank 0 has
    dist.all_gather_object = all_gather_object
    dist.broadcast_object_list = lambda objects, *_, **__: _waits()
