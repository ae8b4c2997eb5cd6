"""One rank of a layout, really built on the meta device, and one micro-batch walked through it with its memory counted."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.data.pack import PackedBatch, Segment, pack_pairs
from megadpo.data.pairs import TokenizedPair
from megadpo.model.build import build_model
from megadpo.model.transformer_config import DTYPES
from megadpo.optimizer import build_optimizer, wrap_for_training
from megadpo.parallel import Layout
from megadpo.parallel.pretend import META, pretend_rank
from megadpo.plan.packs import Lengths, shares_prompt
from megadpo.plan.parameters import Parameter


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make while it is on: alive now, and the most alive at a time.

    Storages are counted once, whatever views them, and until the last view is gone. What existed before is not counted
    (`known`), nor what a kernel takes and frees inside one operation. Works on every device, meta included.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in known:
            self._see(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, leaf.untyped_storage().nbytes())
        return result

    def _see(self, tensor: torch.Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._alive.get(key)
        if known is not None and known() is storage:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True, kw_only=True)
class StageTrace:
    """What one rank holds for one full micro-batch, in bytes, besides weights, gradients, optimizer state and buffers."""

    parameters: list[Parameter]
    reference: list[Parameter]
    buffers: int
    """What megatron-core makes once and keeps: under sequence parallelism, where gathered tokens go."""
    saved: int
    """Alive between a micro-batch's forward and its backward."""
    forward_peak: int
    backward_peak: int
    reference_peak: int
    """Forward without gradients."""


def trace_stage(
    cfg: Config,
    arch: Architecture,
    reference_arch: Architecture | None,
    lengths: Lengths,
    *,
    world_size: int,
    stage: int,
    device_type: str,
) -> StageTrace:
    """Build the first rank of pipeline stage `stage`: model, gradient buffer, optimizer, reference. Then run a pack of
    pairs of `lengths` forward without gradients, as the reference does, and forward and backward.

    device_type: "cuda" or "cpu": whose attention kernel the memory is counted for.
    """
    megatron = cfg.policy.megatron_cfg
    layout = Layout(
        tensor=megatron.tensor_model_parallel_size,
        pipeline=megatron.pipeline_model_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
    )
    ranks_per_stage = world_size // megatron.pipeline_model_parallel_size
    kernel = _TracedKernel(cfg, device_type)
    policy = dataclasses.replace(cfg.policy, attention_kernel="sdpa")  # any device; replaced by ours below
    with pretend_rank(layout, world_size=world_size, rank=stage * ranks_per_stage) as parallel:
        model = build_model(arch, policy, parallel, frozen=False)
        wrapped = wrap_for_training(model, policy)
        build_optimizer(wrapped, policy)
        reference = model
        if reference_arch is not None:
            reference = build_model(reference_arch, policy, parallel, frozen=True)
        walk = _Walk(cfg, parallel.is_first_stage, parallel.is_last_stage, lengths)
        known = [t for module in (model, reference) for t in (*module.parameters(), *module.buffers())]
        known += [buffer.grad_data for buffer in wrapped.buffers]
        model.kernel = reference.kernel = kernel
        forward_only = LiveBytes(known)
        with forward_only, torch.no_grad():
            reference.eval()
            walk.forward(reference)
        reference.train()
        model.train()
        training = LiveBytes(known)
        with training, wrapped.no_sync():
            output = walk.forward(wrapped)
            saved, forward_peak = training.now, training.peak
            torch.autograd.backward(output, grad_tensors=torch.empty_like(output))
            del output
            model.set_input_tensor([None])
            kept = training.now
        own = [_parameter(one) for one in model.parameters()]
        frozen = [] if reference_arch is None else [_parameter(one) for one in reference.parameters()]
    return StageTrace(
        parameters=own,
        reference=frozen,
        buffers=kept,
        saved=saved - kept,
        forward_peak=forward_peak - kept,
        backward_peak=training.peak - kept,
        reference_peak=forward_only.peak - kept,  # its forward takes the same buffer
    )


def _parameter(parameter: torch.nn.Parameter) -> Parameter:
    return Parameter(parameter.numel(), shared_embedding=getattr(parameter, "shared_embedding", False))


class _Walk:
    """A pack made of nothing, and what the stage before would send."""

    def __init__(self, cfg: Config, first: bool, last: bool, lengths: Lengths) -> None:
        self.cfg, self.first, self.last = cfg, first, last
        self.batch = empty_pack(cfg, lengths)

    def forward(self, model: Any) -> torch.Tensor:
        batch = self.batch.to(META)
        if not self.first:
            megatron = self.cfg.policy.megatron_cfg
            tokens = batch.tokens.numel()
            if megatron.sequence_parallel:
                tokens //= megatron.tensor_model_parallel_size
            shape = (tokens, 1, model.config.hidden_size)
            received = torch.empty(shape, dtype=DTYPES[self.cfg.policy.precision], device=META)
            stage = getattr(model, "module", model)  # without DistributedDataParallel around it
            stage.set_input_tensor([received.requires_grad_(torch.is_grad_enabled())])
        output: torch.Tensor = model(batch)
        return output


def empty_pack(cfg: Config, lengths: Lengths) -> PackedBatch:
    """A micro-batch of pairs of these lengths, every token 0."""

    def zeros(count: int) -> Any:
        return np.zeros(count, dtype=np.int32)

    pairs = [TokenizedPair(row, *(zeros(int(n)) for n in sizes)) for row, sizes in enumerate(lengths)]
    return pack_pairs(
        pairs,
        share_prompt=shares_prompt(cfg),
        pad_to_multiple=cfg.policy.make_sequence_length_divisible_by,
        pad_token_id=0,
    )


class _TracedKernel:
    """The kernel of the run's device, or its outline: what it keeps for backward, and nothing else."""

    def __init__(self, cfg: Config, device_type: str) -> None:
        requested: str = cfg.policy.attention_kernel
        if requested == "auto":
            on_gpu = "varlen" if cfg.policy.precision == "bfloat16" else "sdpa"
            requested = on_gpu if device_type == "cuda" else "cpu"
        self.name = requested
        self.inner: Any
        if requested == "cpu":
            from megadpo.model.kernels.cpu import CpuKernel

            self.inner = CpuKernel()
        elif requested == "varlen":
            from megadpo.model.kernels.varlen import VarlenKernel

            self.inner = VarlenKernel()
        else:
            self.inner = _OutlineKernel()

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> Any:
        # the CPU kernel makes its masks where tensors are made by default; the ragged kernels look into their index
        with torch.device(META if self.name == "cpu" else "cpu"):
            return self.inner.plan(segments, device, dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any) -> torch.Tensor:
        result: torch.Tensor = self.inner.attend(q, k, v, plan)
        return result


class _OutlineKernel:
    """Flash attention of any make: keeps q, k, v with shared keys repeated, the output, and one float32 a row and head."""

    def plan(self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype) -> int:
        return sum(segment.key_tokens for segment in segments)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: int) -> torch.Tensor:
        result: torch.Tensor = _Outline.apply(q, k, v, plan)
        return result


class _Outline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, key_tokens):  # type: ignore[no-untyped-def]
        if key_tokens != k.shape[0]:
            k, v = k.new_empty((key_tokens, *k.shape[1:])), v.new_empty((key_tokens, *v.shape[1:]))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        ctx.tokens = q.shape[0]
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, _, _ = ctx.saved_tensors
        repeated = torch.empty_like(k), torch.empty_like(v)
        own = [x.new_empty((ctx.tokens, *x.shape[1:])) for x in repeated]
        return torch.empty_like(q), *own, None
