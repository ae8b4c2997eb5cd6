"""The expected time of a step, from a stated model: rooflines of computation and memory, bandwidths of communication.

An estimate, never a measurement. docs/planning.md has the formulas; gpus.py the figures and the assumptions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.check import data_parallel_size, layers_per_stage
from megadpo.config.schema import Config
from megadpo.plan.flops import forward_flops, matmul_weights_per_layer, step_flops
from megadpo.plan.gpus import Assumptions, Gpu
from megadpo.plan.packs import Pack, Workload
from megadpo.plan.parameters import Buffer, optimizer_bytes_per_element


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
    ) -> None:
        self.cfg, self.arch, self.reference, self.gpu, self.assumed = cfg, arch, reference, gpu, assumed
        self.world_size = world_size
        megatron = cfg.policy.megatron_cfg
        self.tp, self.pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
        self.dp = data_parallel_size(cfg, world_size)
        self.bf16 = cfg.policy.precision == "bfloat16"
        self.width = 2 if self.bf16 else 4
        self.peak_flops = gpu.bf16_flops if self.bf16 else gpu.fp32_flops
        self.memory_rate = gpu.hbm_bytes_per_s * assumed.memory_efficiency

    def step(self, work: Workload, buffers: Sequence[Buffer]) -> StepTime:
        """`buffers`: each stage's, first to last."""
        batches = [self._batch(batch) for batch in work.batches]
        mean = [sum(column) / len(batches) for column in zip(*batches, strict=True)]
        reference_s, train_s, busy_s, last_forward_s, last_backward_s = mean
        exposed = max(self._data_parallel_s(buffer, last_forward_s, last_backward_s) for buffer in buffers)
        optimizer_s = max(self._optimizer_s(buffer) for buffer in buffers)
        packs = [pack for batch in work.batches for rank in batch for pack in rank]
        flops = sum(step_flops(self.arch, self.reference, pack) for pack in packs) / len(work.batches)
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
        # the rank with the most work by a cheap measure; the plan balances tokens, so the ranks are close
        slowest = max(ranks, key=lambda packs: sum(p.tokens * self.arch.hidden_size + p.attention for p in packs))
        train = [(f, b) for f, b in (self._policy_s(pack) for pack in slowest)]
        busy, total = self._pipelined([[f + b for f, b in zip(*pack, strict=True)] for pack in train])
        reference = 0.0
        if self.reference is not None:
            reference = self._pipelined([self._stages_s(self.reference, pack, self._forward_s) for pack in slowest])[1]
        return reference, total, busy, max(train[-1][0]), max(train[-1][1])

    def _pipelined(self, packs: Sequence[Sequence[float]]) -> tuple[float, float]:
        """[micro-batch][stage] seconds -> (busy seconds of the busiest stage, seconds until all is done).

        1F1B: the busiest stage works through all micro-batches, and waits once for a micro-batch to pass every other.
        """
        per_stage = [sum(column) for column in zip(*packs, strict=True)]
        busy = max(per_stage)
        passing = (sum(per_stage) - busy) / len(packs)
        return busy, busy + passing

    def _policy_s(self, pack: Pack) -> tuple[list[float], list[float]]:
        forward = self._stages_s(self.arch, pack, self._forward_s)
        return forward, self._stages_s(self.arch, pack, self._backward_s)

    def _stages_s(self, arch: Architecture, pack: Pack, stage_s: Callable[..., float]) -> list[float]:
        layers = layers_per_stage(self.cfg, arch.num_layers) or []
        return [stage_s(arch, pack, count, stage == self.pp - 1) for stage, count in enumerate(layers)]

    def _forward_s(self, arch: Architecture, pack: Pack, layers: int, last: bool) -> float:
        flops = forward_flops(arch, pack, layers, head=last)
        matmul_s = self._matmul_s(flops.matmul, layers * matmul_weights_per_layer(arch))
        head_s = self._matmul_s(flops.head, arch.hidden_size * arch.vocab_size if last else 0)
        return matmul_s + self._attention_s(flops.attention) + head_s + self._around_s(arch, pack, layers)

    def _backward_s(self, arch: Architecture, pack: Pack, layers: int, last: bool) -> float:
        """Twice the forward; the head computes its logits once more; then what recomputation repeats."""
        flops = forward_flops(arch, pack, layers, head=last)
        weights = layers * matmul_weights_per_layer(arch)
        seconds = 2 * self._matmul_s(flops.matmul, weights) + 2 * self._attention_s(flops.attention)
        if last:
            seconds += 3 * self._matmul_s(flops.head, arch.hidden_size * arch.vocab_size)
        seconds += 2 * self._around_s(arch, pack, layers, communication=False)
        seconds += self._tensor_parallel_s(arch, pack, layers) + self._pipeline_s(arch, pack)
        # a weight's gradient is written, read, and added to the float32 buffer
        seconds += weights / self.tp * (2 * self.width + 8) / self.memory_rate
        return seconds + self._recompute_s(arch, pack, layers)

    def _recompute_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        megatron = self.cfg.policy.megatron_cfg
        if not megatron.activation_checkpointing:
            return 0.0
        if megatron.recompute_granularity == "full":
            if megatron.recompute_method == "block":
                layers = min(layers, megatron.recompute_num_layers)
            return self._forward_s(arch, pack, layers, False) - self._pipeline_s(arch, pack)
        flops = forward_flops(arch, pack, layers, head=False)
        seconds = 0.0
        if "core_attn" in megatron.recompute_modules:
            seconds += self._attention_s(flops.attention)
        if "mlp" in megatron.recompute_modules:
            mlp = 3 * arch.hidden_size * arch.ffn_hidden_size / matmul_weights_per_layer(arch)
            seconds += self._matmul_s(flops.matmul * mlp, layers * matmul_weights_per_layer(arch) * mlp)
        return seconds

    def _matmul_s(self, flops: float, weights: float) -> float:
        """Roofline over this rank's share: the peak, or reading the weights once."""
        computing = flops / self.tp / (self.peak_flops * self.assumed.matmul_efficiency)
        return max(computing, weights / self.tp * self.width / self.memory_rate)

    def _attention_s(self, flops: float) -> float:
        return flops / self.tp / (self.peak_flops * self.assumed.attention_efficiency)

    def _around_s(self, arch: Architecture, pack: Pack, layers: int, *, communication: bool = True) -> float:
        """Norms, residuals, rotation, SwiGLU, by the bytes they read and write; with it, forward's communication."""
        shards = self.tp if self.cfg.policy.megatron_cfg.sequence_parallel else 1
        elements = 10 * arch.hidden_size / shards  # two norms (read, write), two residual sums (read 2, write)
        elements += 2 * (arch.num_heads + arch.num_kv_heads) * arch.head_dim / self.tp
        elements += 3 * arch.ffn_hidden_size / self.tp
        seconds = elements * pack.tokens * layers * self.width / self.memory_rate
        if communication:
            seconds += self._tensor_parallel_s(arch, pack, layers) + self._pipeline_s(arch, pack)
        return seconds

    def _tensor_parallel_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """Two all-reduces a layer and pass, or under sequence parallelism two all-gathers and two reduce-scatters: the
        same bytes on the wire, in a ring."""
        if self.tp == 1:
            return 0.0
        wire = 4 * (self.tp - 1) / self.tp * pack.tokens * arch.hidden_size * self.width
        calls = 4 if self.cfg.policy.megatron_cfg.sequence_parallel else 2
        return layers * (wire / self._rate(self.tp) + calls * self.assumed.collective_latency_s)

    def _pipeline_s(self, arch: Architecture, pack: Pack) -> float:
        """One send of the hidden states to the next stage."""
        if self.pp == 1:
            return 0.0
        shards = self.tp if self.cfg.policy.megatron_cfg.sequence_parallel else 1
        sent = pack.tokens * arch.hidden_size * self.width / shards
        return sent / self._rate(self.world_size) + self.assumed.collective_latency_s

    def _data_parallel_s(self, buffer: Buffer, forward_s: float, backward_s: float) -> float:
        """Reduce-scatter of gradients and all-gather of parameters (or an all-reduce), less what overlaps: the reduction
        with the last micro-batch's backward, the gather with the next step's first forward."""
        if self.dp == 1:
            return 0.0
        megatron = self.cfg.policy.megatron_cfg
        ddp = megatron.distributed_data_parallel_config
        gradient_width = 4 if ddp.grad_reduce_in_fp32 or not self.bf16 else 2
        once = (self.dp - 1) / self.dp * buffer.elements / self._rate(self.tp * self.dp)
        distributed = megatron.optimizer.use_distributed_optimizer
        reduce_s = once * gradient_width * (1 if distributed else 2)
        gather_s = once * self.width if distributed else 0.0
        if ddp.overlap_grad_reduce:
            reduce_s = max(0.0, reduce_s - backward_s)
        if ddp.overlap_param_gather:
            gather_s = max(0.0, gather_s - forward_s)
        return reduce_s + gather_s

    def _optimizer_s(self, buffer: Buffer) -> float:
        """Bound by memory: every state is read and written, the gradient read twice, gradients set to zero."""
        state = 2 * (optimizer_bytes_per_element(self.cfg.policy.megatron_cfg, self.bf16) + (0 if self.bf16 else 4))
        mine = max(buffer.shard_elements) * (state + 2 * 4 + self.width)
        return (mine + buffer.elements * 4) / self.memory_rate

    def _rate(self, span: int) -> float:
        """Bytes/s of one GPU in a group that spans `span` consecutive ranks: NVLink inside a node, else the network."""
        if span <= self.assumed.gpus_per_node:
            return self.gpu.nvlink_bytes_per_s * self.assumed.nvlink_efficiency
        return self.gpu.network_bytes_per_s * self.assumed.network_efficiency
