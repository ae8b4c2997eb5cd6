"""Builds one rank of a layout on the meta device, runs one micro-batch through it, and counts the memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megadpo.config.architecture import Architecture
from megadpo.config.grid import Grid
from megadpo.config.schema import Config
from megadpo.config.schema_policy import PolicyConfig
from megadpo.config.variants import OPTIMIZERS
from megadpo.data.batches.cut import context_part
from megadpo.data.batches.groups import PairGroups
from megadpo.data.batches.pack import PackedBatch, pack_pairs
from megadpo.data.pairs import TokenizedPair
from megadpo.lora.attach import attach, switched
from megadpo.model.build import build_model, is_expert
from megadpo.model.freeze import freeze
from megadpo.model.transformer_config import DTYPES
from megadpo.optimizer.build import build_optimizer, wrap_for_training
from megadpo.parallel.pretend import META, gather_buffers, pretend_rank
from megadpo.plan.outlines import (
    Answers,
    TracedHead,
    TracedKernel,
    addresses,
    even_routing,
    fusions_of,
    uses_fused_head,
)
from megadpo.plan.packs import Lengths, shares_prompt
from megadpo.plan.parameters import Parameter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while this mode is on: `now` and `peak`.

    A storage counts once, until its last view is freed. Tensors that existed before (`known`) don't count, nor memory that
    a kernel allocates and frees within one operation. It works on every device, also meta.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), answers: Answers | None = None) -> None:
        """answers: results of operations that need values."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._answers = {} if answers is None else answers
        for tensor in known:
            self._see(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = None
        if func in self._answers:
            result = self._answers[func](*args, **(kwargs or {}))
        if result is None:
            result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, torch.Tensor):
            self._see(result, result.untyped_storage().nbytes())
        elif result is not None:
            for leaf in result if isinstance(result, (list, tuple)) else tree_leaves(result):
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
class ChunkTrace:
    """Bytes of one full micro-batch in one model chunk."""

    saved: int
    """Between its forward and its backward."""
    forward_peak: int
    backward_peak: int
    reference_peak: int
    """Forward without gradients."""


@dataclass(frozen=True, kw_only=True)
class StageTrace:
    """The chunks of one rank, and their bytes besides weights, gradients and optimizer state."""

    parameters: list[list[Parameter]]
    reference: list[list[Parameter]]
    """Empty if the reference has the policy's architecture, or if there is none."""
    chunks: list[ChunkTrace]
    buffers: int
    """Bytes that are allocated once: with sequence parallelism, buffers of gathered tokens; with experts, the state of the
    reference's dispatchers."""


def trace_stage(
    cfg: Config,
    arch: Architecture,
    reference_arch: Architecture | None,
    lengths: Lengths,
    *,
    grid: Grid,
    device_type: Literal["cpu", "cuda"],
    expert_load: float = 1.0,
) -> StageTrace:
    """Builds the rank of `grid`: model, gradient buffers, optimizer, reference. Then runs a pack of pairs with `lengths`
    through each of its chunks: forward without gradients, like the reference, and forward and backward.

    device_type: "cuda" or "cpu": the device whose kernels are counted.
    expert_load: tokens of this rank's experts / tokens with even routing.
    """
    policy = _buildable(cfg.policy)
    with (
        pretend_rank(grid) as parallel,
        fusions_of(device_type),
        addresses(),
        even_routing(arch, expert_load) as answers,
    ):
        model = build_model(arch, policy, parallel, frozen=False)
        freeze(model, policy.freeze, arch)
        peft = policy.megatron_cfg.peft
        adapters = attach(model, arch, peft, parallel) if peft.enabled else []
        wrapped = wrap_for_training(model, policy)
        build_optimizer(wrapped, policy, META)
        reference = model
        if reference_arch is not None:
            reference = build_model(reference_arch, policy, parallel, frozen=True)
        known = [t for module in (*model, *reference) for t in (*module.parameters(), *module.buffers())]
        known += [buffer.grad_data for one in wrapped for buffer in (*one.buffers, *one.expert_parallel_buffers)]
        kernel = TracedKernel(cfg, arch, device_type)
        for chunk in (*model, *reference):
            chunk.kernel = kernel
            if uses_fused_head(cfg, device_type):
                chunk.head = TracedHead()
        if model[0].balance is not None:
            model[0].balance.start(num_tokens=1, num_pairs=1)
        walk = _Walk(cfg, lengths)
        kinds = _kinds(wrapped, alike=not policy.freeze and not peft.enabled)
        traced = sorted(set(kinds))
        with switched(adapters if cfg.dpo.reference.mode == "adapter_off" else []):
            peaks, state = _without_gradients([reference[n] for n in traced], walk, known, answers)
        buffers = gather_buffers()
        sizes = _with_gradients([wrapped[n] for n in traced], walk, [*known, *buffers], answers)
        each = {n: ChunkTrace(reference_peak=peak, **one) for n, peak, one in zip(traced, peaks, sizes, strict=True)}
        own = [[_parameter(one) for one in chunk.parameters()] for chunk in model]
        frozen = [] if reference_arch is None else [[_parameter(one) for one in c.parameters()] for c in reference]
    return StageTrace(
        parameters=own,
        reference=frozen,
        chunks=[each[kind] for kind in kinds],
        buffers=sum(one.untyped_storage().nbytes() for one in buffers) + state,
    )


def _kinds(chunks: Sequence[Any], *, alike: bool) -> list[int]:
    """For each chunk the first one of its kind: with `alike`, those of the same layers that both begin or both end the
    model, or do neither."""
    kinds = [
        (
            chunk.module.pre_process,
            chunk.module.post_process,
            [chunk.module.arch.layers[layer.layer_number - 1] for layer in chunk.module.decoder.layers],
        )
        for chunk in chunks
    ]
    return [kinds.index(one) if alike else number for number, one in enumerate(kinds)]


def _buildable(policy: PolicyConfig) -> PolicyConfig:
    """`policy` without settings that need a GPU to build. Weights and the optimizer's bytes don't depend on them; kernels are
    replaced (outlines.py). Activations of Transformer Engine's layers count as those of megatron-core's layers."""
    megatron = policy.megatron_cfg
    torchs = {"adam_impl": "torch"} if megatron.optimizer.optimizer == "adam" else {}
    optimizer = dataclasses.replace(megatron.optimizer, options=OPTIMIZERS.defaults() | torchs)
    megatron = dataclasses.replace(
        megatron,
        optimizer=optimizer,
        moe_grouped_gemm=False,
        transformer_impl="local",
        apply_rope_fusion=False,
        fused_single_qkv_rope=False,
        gradient_accumulation_fusion=None,
    )
    return dataclasses.replace(policy, attention_kernel="sdpa", logprob_kernel="torch", megatron_cfg=megatron)


def _parameter(parameter: torch.nn.Parameter) -> Parameter:
    return Parameter(
        parameter.numel(),
        shared_embedding=getattr(parameter, "shared_embedding", False),
        expert=is_expert(parameter),
        trainable=parameter.requires_grad,
        wide=parameter.dtype == torch.float32 and not parameter.requires_grad,
    )


def _without_gradients(
    chunks: Sequence[Any], walk: _Walk, known: list[torch.Tensor], answers: Answers
) -> tuple[list[int], int]:
    """The peak bytes of each chunk's forward, and the bytes that stay after it (dispatchers of experts keep the last
    micro-batch's routing). Both without megatron-core's buffers, which are allocated here."""
    peaks, state = [], 0
    for chunk in chunks:
        chunk.eval()
        live = LiveBytes(known, answers)
        with live, torch.no_grad():
            walk.forward(chunk)
        chunk.train()
        made = sum(one.untyped_storage().nbytes() for one in gather_buffers())
        seen = made if live.now >= made else 0
        peaks.append(live.peak - seen)
        state += live.now - seen
    return peaks, state


def _with_gradients(
    chunks: Sequence[Any], walk: _Walk, known: list[torch.Tensor], answers: Answers
) -> list[dict[str, int]]:
    """Each chunk's bytes. The state of dispatchers counts for a micro-batch, because the next one replaces it."""
    found: list[dict[str, int]] = []
    live = LiveBytes(known, answers)
    for chunk in chunks:
        before = live.peak = live.now
        with live, chunk.no_sync():
            output = walk.forward(chunk)
            saved, forward_peak = live.now, live.peak
            live.peak = live.now
            if output.requires_grad:  # False if everything up to here is frozen
                torch.autograd.backward(output, grad_tensors=torch.empty_like(output))
            del output
            chunk.module.set_input_tensor([None])
        sizes = {"saved": saved, "forward_peak": forward_peak, "backward_peak": live.peak}
        found.append({name: size - before for name, size in sizes.items()})
    return found


class _Walk:
    """Runs chunks on a pack without values, with the input that the stage before would send."""

    def __init__(self, cfg: Config, lengths: Lengths) -> None:
        self.cfg = cfg
        self.batch = largest_part(empty_pack(cfg, lengths), cfg.policy.megatron_cfg.context_parallel_size)

    def forward(self, chunk: Any) -> torch.Tensor:
        """The output of a chunk, wrapped for training or not."""
        batch = self.batch.to(META)
        inner = getattr(chunk, "module", chunk)
        if not inner.pre_process:
            megatron = self.cfg.policy.megatron_cfg
            tokens = batch.tokens.numel()
            if megatron.sequence_parallel:
                tokens //= megatron.tensor_model_parallel_size
            shape = (tokens, 1, inner.config.hidden_size)
            received = torch.empty(shape, dtype=DTYPES[self.cfg.policy.precision], device=META)
            inner.set_input_tensor([received.requires_grad_(torch.is_grad_enabled())])
        output: torch.Tensor = chunk(batch)
        return output


def largest_part(batch: PackedBatch, ranks: int) -> PackedBatch:
    """The part of a context-parallel pack whose queries see the most keys. All parts have the same number of tokens."""
    parts = (context_part(batch, rank, ranks) for rank in range(ranks))
    return max(parts, key=lambda part: sum(segment.key_tokens for segment in part.segments))


def empty_pack(cfg: Config, lengths: Lengths) -> PackedBatch:
    """A micro-batch of prompts and answers of these lengths, every token 0. Of more than two answers each makes a pair with
    the next one."""

    def zeros(count: int) -> Any:
        return np.zeros(count, dtype=np.int32)

    pairs, numbers = [], []
    for row, (prompt, *sizes) in enumerate(lengths.tolist()):
        for number, (one, other) in enumerate(pairwise(size for size in sizes if size)):
            pairs.append(TokenizedPair(row, zeros(prompt), zeros(one), zeros(other)))
            numbers.append((row, row * len(sizes) + number, row * len(sizes) + number + 1))
    columns = np.array(numbers, dtype=np.int64)
    texts = np.array([(one.prompt_tokens, one.chosen_tokens, one.rejected_tokens) for one in pairs], dtype=np.int64)
    return pack_pairs(
        pairs,
        share_prompt=shares_prompt(cfg),
        pad_to_multiple=cfg.policy.make_sequence_length_divisible_by,
        pad_token_id=0,
        groups=PairGroups.made(columns[:, 0], columns[:, 1:], texts[:, 0], texts[:, 1:])
        if shares_prompt(cfg)
        else None,
    )
