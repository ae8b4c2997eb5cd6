"""The expected time of a step, from a stated model: rooflines of computation and memory, bandwidths of communication.

An estimate, never a measurement. docs/planning.md has the formulas; gpus.py the figures and the assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.check import layers_per_stage
from megadpo.config.schema import Config
from megadpo.plan.flops import expert_weights, forward_flops, mlp_weights, projection_weights, step_flops
from megadpo.plan.gpus import Assumptions, Gpu
from megadpo.plan.grid import Grid
from megadpo.plan.links import Links
from megadpo.plan.packs import Pack, Workload
from megadpo.plan.parameters import StageBuffers, optimizer_bytes_per_element


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Expected seconds of the parts of a step, means over the workload's global batches."""

    reference_s: float
    train_s: float
    """Forward and backward of the policy through the pipeline."""
    data_parallel_s: float
    """What of gradient reduction and parameter gather is not hidden behind computation."""
    optimizer_s: float
    bubble: float
    """Share (0..1) of `train_s` in which the slowest stage waits for the others."""
    flops: float
    """Per step, whole world, without recomputation."""
    mfu: float

    @property
    def total_s(self) -> float:
        return self.reference_s + self.train_s + self.data_parallel_s + self.optimizer_s


class TimeModel:
    """Times of one layout on one kind of GPU."""

    def __init__(
        self,
        cfg: Config,
        arch: Architecture,
        reference: Architecture | None,
        gpu: Gpu,
        assumed: Assumptions,
        world_size: int,
        trainable: float = 1.0,
    ) -> None:
        """trainable: share of the weights that get gradients."""
        self.cfg, self.arch, self.reference, self.gpu, self.assumed = cfg, arch, reference, gpu, assumed
        self.world_size, self.trainable = world_size, trainable
        self.megatron = cfg.policy.megatron_cfg
        self.grid = Grid.of(cfg, world_size)
        self.links = Links(cfg, self.grid, gpu, assumed)
        self.bf16 = cfg.policy.precision == "bfloat16"
        self.width = 2 if self.bf16 else 4
        self.peak_flops = gpu.bf16_flops if self.bf16 else gpu.fp32_flops
        self.memory_rate = gpu.hbm_bytes_per_s * assumed.memory_efficiency
        self.sharers = self.grid.tensor * self.grid.context
        """Ranks that share out a micro-batch's computation in a stage."""

    def step(self, work: Workload, buffers: Sequence[StageBuffers]) -> StepTime:
        """`buffers`: each stage's, first to last."""
        batches = [self._batch(batch) for batch in work.batches]
        mean = [sum(column) / len(batches) for column in zip(*batches, strict=True)]
        reference_s, train_s, busy_s, last_forward_s, last_backward_s = mean
        exposed = max(self.links.data_parallel_s(buffer, last_forward_s, last_backward_s) for buffer in buffers)
        optimizer_s = max(self._optimizer_s(buffer) for buffer in buffers)
        packs = [pack for batch in work.batches for rank in batch for pack in rank]
        flops = sum(step_flops(self.arch, self.reference, pack, trainable=self.trainable) for pack in packs)
        flops /= len(work.batches)
        total = reference_s + train_s + exposed + optimizer_s
        return StepTime(
            reference_s=reference_s,
            train_s=train_s,
            data_parallel_s=exposed,
            optimizer_s=optimizer_s,
            bubble=1 - busy_s / train_s,
            flops=flops,
            mfu=flops / (total * self.world_size * self.peak_flops),
        )

    def _batch(self, ranks: Sequence[Sequence[Pack]]) -> tuple[float, float, float, float, float]:
        """The slowest rank's: reference, training, busy seconds, and one pack's forward and backward seconds."""
        # the rank with the most work by a cheap measure; the plan balances work, so the ranks are close
        slowest = max(ranks, key=lambda packs: sum(p.tokens * self.arch.hidden_size + p.attention for p in packs))
        train = [(f, b) for f, b in (self._policy_s(pack) for pack in slowest)]
        busy, total = self._pipelined([[f + b for f, b in zip(*pack, strict=True)] for pack in train])
        reference = 0.0
        if self.reference is not None:
            reference = self._pipelined([self._stages_s(self.reference, pack, self._forward_s) for pack in slowest])[1]
        return reference, total, busy, max(train[-1][0]), max(train[-1][1])

    def _pipelined(self, packs: Sequence[Sequence[float]]) -> tuple[float, float]:
        """[micro-batch][stage] seconds -> (busy seconds of the busiest stage, seconds until all is done).

        1F1B: the busiest stage works through all micro-batches, and waits once for a micro-batch to pass every other; with
        a virtual pipeline, only for it to pass one chunk of every other (arXiv:2104.04473, section 2.2).
        """
        per_stage = [sum(column) for column in zip(*packs, strict=True)]
        busy = max(per_stage)
        passing = (sum(per_stage) - busy) / len(packs) / self.grid.virtual_pipeline
        return busy, busy + passing

    def _policy_s(self, pack: Pack) -> tuple[list[float], list[float]]:
        forward = self._stages_s(self.arch, pack, self._forward_s)
        return forward, self._stages_s(self.arch, pack, self._backward_s)

    def _stages_s(self, arch: Architecture, pack: Pack, stage_s: Callable[..., float]) -> list[float]:
        layers = layers_per_stage(self.cfg, arch.num_layers) or []
        return [stage_s(arch, pack, count, stage == self.grid.pipeline - 1) for stage, count in enumerate(layers)]

    def _forward_s(self, arch: Architecture, pack: Pack, layers: int, last: bool) -> float:
        flops = forward_flops(arch, pack, layers, head=last)
        matmul_s = self._matmul_s(flops.matmul, layers * (projection_weights(arch) + mlp_weights(arch)))
        head_s = self._matmul_s(flops.head, arch.hidden_size * arch.vocab_size if last else 0)
        seconds = matmul_s + self._attention_s(flops.attention) + head_s + self._around_s(arch, pack, layers)
        seconds += self._experts_s(arch, flops.experts, layers) + self._router_s(flops.router)
        return seconds + self.links.forward_s(arch, pack, layers) + self.links.pipeline_s(arch, pack)

    def _backward_s(self, arch: Architecture, pack: Pack, layers: int, last: bool) -> float:
        """Gradients of inputs and of trained weights, each as much as the forward; the head computes its logits once more;
        then what recomputation repeats."""
        flops = forward_flops(arch, pack, layers, head=last)
        both = 1 + self.trainable
        weights = layers * (projection_weights(arch) + mlp_weights(arch))
        seconds = both * self._matmul_s(flops.matmul, weights) + 2 * self._attention_s(flops.attention)
        seconds += both * (self._experts_s(arch, flops.experts, layers) + self._router_s(flops.router))
        if last:
            seconds += (1 + both) * self._matmul_s(flops.head, arch.hidden_size * arch.vocab_size)
        seconds += 2 * self._around_s(arch, pack, layers)
        seconds += self.links.backward_s(arch, pack, layers) + self.links.pipeline_s(arch, pack)
        # a weight's gradient is written, read, and added to the float32 buffer
        held = weights / self.grid.tensor + self._held_experts(arch, layers)
        seconds += self.trainable * held * (2 * self.width + 8) / self.memory_rate
        return seconds + self._recompute_s(arch, pack, layers)

    def _recompute_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        megatron = self.megatron
        if not megatron.activation_checkpointing:
            return 0.0
        if megatron.recompute_granularity == "full":
            if megatron.recompute_method == "block":
                layers = min(layers, megatron.recompute_num_layers * self.grid.virtual_pipeline)
            return self._forward_s(arch, pack, layers, False) - self.links.pipeline_s(arch, pack)
        flops = forward_flops(arch, pack, layers, head=False)
        seconds = 0.0
        if "core_attn" in megatron.recompute_modules:
            seconds += self._attention_s(flops.attention)
        if {"mlp", "moe", "shared_experts"} & set(
            megatron.recompute_modules
        ):  # of a layer with experts, `mlp` is shared
            share = mlp_weights(arch) / (projection_weights(arch) + mlp_weights(arch))
            seconds += self._matmul_s(flops.matmul * share, layers * mlp_weights(arch))
        if "moe" in megatron.recompute_modules:
            seconds += self._experts_s(arch, flops.experts, layers) + self._router_s(flops.router)
            seconds += self.links.experts_s(arch, pack, layers)
        return seconds

    def _matmul_s(self, flops: float, weights: float) -> float:
        """Roofline over this rank's share: the peak, or reading the weights once."""
        computing = flops / self.sharers / (self.peak_flops * self.assumed.matmul_efficiency)
        return max(computing, weights / self.grid.tensor * self.width / self.memory_rate)

    def _experts_s(self, arch: Architecture, flops: float, layers: int) -> float:
        """The same for experts, on the rank whose experts get most tokens: the others wait for it."""
        load = min(self.assumed.expert_load, self.grid.expert)
        computing = load * flops / self.sharers / (self.peak_flops * self.assumed.expert_matmul_efficiency)
        return max(computing, self._held_experts(arch, layers) * self.width / self.memory_rate)

    def _held_experts(self, arch: Architecture, layers: int) -> float:
        """Elements of experts on one rank."""
        if arch.moe is None:
            return 0.0
        return layers * arch.moe.num_experts * expert_weights(arch) / (self.grid.expert * self.grid.expert_tensor)

    def _router_s(self, flops: float) -> float:
        rates = {"fp64": self.gpu.fp64_flops, "fp32": self.gpu.fp32_flops, None: self.peak_flops}
        rate = rates[self.megatron.moe_router_dtype] * self.assumed.matmul_efficiency
        return flops / self.sharers / rate

    def _attention_s(self, flops: float) -> float:
        return flops / self.sharers / (self.peak_flops * self.assumed.attention_efficiency)

    def _around_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """Norms, residuals, rotation, SwiGLU, sorting tokens by expert: by the bytes they read and write."""
        tp, moe = self.grid.tensor, arch.moe
        shards = tp if self.megatron.sequence_parallel else 1
        elements = 10 * arch.hidden_size / shards  # two norms (read, write), two residual sums (read 2, write)
        elements += 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim / tp
        elements += mlp_weights(arch) / arch.hidden_size / tp
        if moe is not None:  # to the ranks' order, to the experts' order, and both back: each read and written
            elements += moe.experts_per_token * (8 * arch.hidden_size + 3 * moe.ffn_hidden_size) / tp
        return elements * pack.tokens / self.grid.context * layers * self.width / self.memory_rate

    def _optimizer_s(self, buffers: StageBuffers) -> float:
        """Bound by memory: every state is read and written, the gradient read twice, gradients set to zero."""
        state = 2 * (optimizer_bytes_per_element(self.megatron, self.bf16) + (0 if self.bf16 else 4))
        mine = sum(buffers.largest_shards(self.grid)) * (state + 2 * 4 + self.width)
        return (mine + buffers.elements * 4) / self.memory_rate
