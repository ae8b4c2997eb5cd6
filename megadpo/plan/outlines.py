"""Replacements for a trace on the meta device, where tensors have no values: attention kernels, fused functions of the run's
device, and the routing of tokens to experts. Each saves the same tensors for backward as the original."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.transformer import mlp
from megatron.core.transformer.moe import token_dispatcher

from megadpo.config.architecture import Architecture
from megadpo.config.known import Known, Machine
from megadpo.config.schema import Config
from megadpo.config.variants import ATTENTION_KERNELS
from megadpo.data.batches.pack import Segment
from megadpo.model import build, moe
from megadpo.model.heads import LogpsHead
from megadpo.model.heads.triton import block_columns
from megadpo.model.kernels import AttentionKernel
from megadpo.parallel.pretend import META

Answers = Mapping[Any, Callable[..., Any]]
"""Operation -> a function that returns its result, or None to run the operation itself."""


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def fusions_of(device_type: str) -> Iterator[None]:
    """In this context models are built with the fused functions of `device_type`. (On GPUs each is one compiled kernel.)"""
    original = build.transformer_config

    def of_that_device(arch: Any, policy: Any, device: torch.device, **options: Any) -> Any:
        return original(arch, policy, torch.device(device_type), **options)

    with (
        _replaced(build, "transformer_config", of_that_device),
        _replaced(mlp, "bias_swiglu_impl", lambda x, bias, *_: _FusedSwiGlu.apply(x, None)),
        _replaced(mlp, "bias_geglu_impl", lambda x, bias, *_: _FusedSwiGlu.apply(x, None)),
        _replaced(mlp, "weighted_bias_swiglu_impl", lambda x, bias, weights, *_: _FusedSwiGlu.apply(x, weights)),
    ):
        yield


class _FusedSwiGlu(torch.autograd.Function):
    """x [..., 2F] -> [..., F]: saves its input and the experts' weights, and makes no other tensors."""

    @staticmethod
    def forward(ctx, x, weights):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weights)
        return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weights = ctx.saved_tensors
        return torch.empty_like(x), None if weights is None else torch.empty_like(weights)


@contextlib.contextmanager
def even_routing(arch: Architecture, load: float) -> Iterator[Answers]:
    """In this context every expert gets the same number of tokens, and this rank's experts `load` times as many.
    megatron-core's code does the rest. Yields the Answers that a trace needs."""
    if arch.experts is None:
        yield {}
        return
    alltoall, allgather = token_dispatcher.MoEAlltoAllTokenDispatcher, token_dispatcher.MoEAllGatherTokenDispatcher
    counts = _Counts(arch.experts.number, arch.experts.per_token, load)
    gather = allgather.dispatch_postprocess

    def dispatch_postprocess(self: Any, hidden_states: torch.Tensor, probs: torch.Tensor) -> Any:
        counts.tokens = hidden_states.shape[0]
        return gather(self, hidden_states, probs)

    with (
        _replaced(moe, "most_tokens", lambda local, group, device: local),
        _replaced(alltoall, "preprocess", lambda self, routing_map: _preprocess(self, routing_map, counts)),
        _replaced(allgather, "dispatch_postprocess", dispatch_postprocess),
    ):
        yield {
            torch.ops.aten.masked_select.default: counts.masked_select,
            torch.ops.aten._to_copy.default: counts.to_copy,
        }


class _Counts:
    """The numbers of tokens for each expert, which tensors without values don't have."""

    def __init__(self, experts: int, topk: int, load: float) -> None:
        self.experts, self.topk, self.load = experts, topk, load
        self.tokens = 0
        """Tokens of all ranks that gather theirs."""

    def even(self, tokens: int, local: int) -> torch.Tensor:
        """int64 [experts]: tokens of each expert. The first `local` experts are on this rank."""
        total = tokens * self.topk
        here = total if local == self.experts else min(round(total * self.load * local / self.experts), total)

        def split(count: int, parts: int) -> list[int]:
            return [count * (part + 1) // parts - count * part // parts for part in range(parts)]

        elsewhere = split(total - here, self.experts - local) if local < self.experts else []
        return torch.tensor([*split(here, local), *elsewhere])

    def masked_select(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """mask: [experts of a rank, tokens]."""
        if x.device != META:
            return None
        local, tokens = mask.shape
        return x.new_empty(int(self.even(tokens, local)[:local].sum()))

    def to_copy(self, x: torch.Tensor, **options: Any) -> torch.Tensor | None:
        """Token counts [experts of a rank] that are copied to the host."""
        if x.device != META or str(options.get("device")) != "cpu":
            return None
        return self.even(self.tokens, x.numel())[: x.numel()]


@contextlib.contextmanager
def addresses() -> Iterator[None]:
    """In this context every meta storage has its own address, by which code recognises views of the same tensor
    (model/context.py, kernels/cpu.py). torch gives 0 for all."""
    address = torch.UntypedStorage.data_ptr

    def of(storage: torch.UntypedStorage) -> int:
        return id(storage) if storage.device == META else address(storage)

    with _replaced(torch.UntypedStorage, "data_ptr", of):
        yield


def uses_fused_head(cfg: Config, device_type: str) -> bool:
    """Whether the run uses the head model/heads/triton: on GPUs, unless the config says torch."""
    return device_type == "cuda" and cfg.policy.logprob_kernel != "torch"


class TracedHead(LogpsHead):
    """Makes the tensors of the fused head, without computing."""

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_tokens: int, **_: Any
    ) -> torch.Tensor:
        rows = hidden.shape[0]
        logits = rows * block_columns(rows, weight.shape[0], chunk_tokens)
        result: torch.Tensor = _FusedHead.apply(hidden.contiguous(), weight, targets, logits)
        return result


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, logits):  # type: ignore[no-untyped-def]
        log_sum, buffer = hidden.new_empty(hidden.shape[0], dtype=torch.float32), _floats(hidden, logits)
        del buffer
        ctx.save_for_backward(hidden, weight, targets, log_sum)
        ctx.logits = logits
        return torch.empty_like(log_sum)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        hidden, weight, _, _ = ctx.saved_tensors
        buffer = _floats(hidden, ctx.logits)
        slopes = buffer if hidden.dtype == torch.float32 else torch.empty_like(buffer, dtype=hidden.dtype)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        gradients = None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight
        del buffer, slopes
        return *gradients, None, None


def _floats(like: torch.Tensor, count: int) -> torch.Tensor:
    return like.new_empty(count, dtype=torch.float32)


def _preprocess(dispatcher: Any, routing_map: torch.Tensor, counts_of: _Counts) -> torch.Tensor:
    """Replaces MoEAlltoAllTokenDispatcher.preprocess. It sets the same attributes, with equal counts from every rank."""
    local, ranks = dispatcher.num_local_experts, dispatcher.tp_size * dispatcher.ep_size
    counts = counts_of.even(routing_map.shape[0], local)
    mine = counts[:local]
    dispatcher.num_out_tokens = int(counts.sum())
    if ranks > 1:
        dispatcher.input_splits = counts.reshape(dispatcher.ep_size, local).sum(1).numpy()
        dispatcher.output_splits = np.full(dispatcher.ep_size, int(mine.sum()))
        dispatcher.output_splits_tp = np.full(dispatcher.tp_size, int(mine.sum()) * dispatcher.ep_size)
    if local > 1:
        dispatcher.num_global_tokens_per_local_expert = mine.repeat(ranks, 1)
    return mine * ranks


class TracedKernel(AttentionKernel):
    """The kernel of the run's device, or a replacement that only saves the same tensors for backward."""

    def __init__(self, cfg: Config, arch: Architecture, device_type: Literal["cpu", "cuda"]) -> None:
        known = Known(cfg=cfg, arch=arch, machine=Machine(device=device_type))
        kernel: AttentionKernel = ATTENTION_KERNELS.choose(known)
        self.name = kernel.name
        written_out = any(one.sinks or one.logit_softcap is not None for one in arch.attentions)
        real = self.name in ("cpu", "varlen") or (self.name == "sdpa" and written_out)
        self.inner: Any = kernel if real else _OutlineKernel()

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> Any:
        # the CPU kernel makes masks on the default device; the ragged kernels read values of their index
        with torch.device(META if self.name == "cpu" else "cpu"):
            return self.inner.plan(segments, device, dtype, window)

    def prepare(self, k: torch.Tensor, v: torch.Tensor, plan: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prepared: tuple[torch.Tensor, torch.Tensor] = self.inner.prepare(k, v, plan)
        return prepared

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, **asked: Any) -> torch.Tensor:
        result: torch.Tensor = self.inner.attend(q, k, v, plan, **asked)
        return result


class _OutlineKernel:
    """Any flash attention: saves q, k and v with shared keys repeated, the output, and a float32 for each row and head."""

    def plan(
        self, segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, window: int | None = None
    ) -> int:
        return sum(segment.rows(0, segment.query_tokens, window).key_tokens for segment in segments)

    def prepare(self, k: torch.Tensor, v: torch.Tensor, plan: int) -> tuple[torch.Tensor, torch.Tensor]:
        if plan == k.shape[0]:
            return k, v
        index = torch.empty(plan, dtype=torch.int64, device=META)
        return k.index_select(0, index), v.index_select(0, index)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: int, **asked: Any) -> torch.Tensor:
        result: torch.Tensor = _Outline.apply(q, k, v)
        return result


class _Outline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
        out = q.new_empty((*q.shape[:2], v.shape[2]))
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
