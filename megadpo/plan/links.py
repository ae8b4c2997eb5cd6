"""The expected time of communication, from bandwidths; part of the model in timing.py. An estimate, never a measurement."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.plan.gpus import Assumptions, Gpu
from megadpo.plan.grid import Grid
from megadpo.plan.packs import Pack
from megadpo.plan.parameters import Buffer, StageBuffers


class Links:
    """Seconds that one rank of a layout spends talking."""

    def __init__(self, cfg: Config, grid: Grid, gpu: Gpu, assumed: Assumptions) -> None:
        self.grid, self.gpu, self.assumed = grid, gpu, assumed
        self.megatron = cfg.policy.megatron_cfg
        self.bf16 = cfg.policy.precision == "bfloat16"
        self.width = 2 if self.bf16 else 4

    def forward_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """Everything but the pipeline's sends."""
        return (
            self.tensor_parallel_s(arch, pack, layers)
            + self.context_parallel_s(arch, pack, layers)
            + self.experts_s(arch, pack, layers)
        )

    def backward_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """As much again; keys and values are gathered once more and their gradients scattered."""
        return self.forward_s(arch, pack, layers) + self.context_parallel_s(arch, pack, layers)

    def tensor_parallel_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """Around attention, and around an MLP or shared expert, an all-reduce; or under sequence parallelism an all-gather
        and a reduce-scatter: the same bytes on the wire, in a ring. Experts get their tokens otherwise."""
        tp = self.grid.tensor
        if tp == 1:
            return 0.0
        blocks = 2 if arch.moe is None or arch.moe.shared_ffn_hidden_size else 1
        tokens = pack.tokens / self.grid.context
        wire = 2 * blocks * (tp - 1) / tp * tokens * arch.hidden_size * self.width
        calls = blocks * (2 if self.megatron.sequence_parallel else 1)
        return layers * (wire / self._rate(tp) + calls * self.assumed.collective_latency_s)

    def context_parallel_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """All-gather of a layer's keys and values."""
        cp = self.grid.context
        if cp == 1:
            return 0.0
        elements = 2 * arch.num_kv_heads * arch.head_dim / self.grid.tensor * pack.tokens
        wire = (cp - 1) / cp * elements * self.width
        return layers * (wire / self._rate(self.grid.tensor * cp) + self.assumed.collective_latency_s)

    def experts_s(self, arch: Architecture, pack: Pack, layers: int) -> float:
        """Tokens to their experts' ranks and back. alltoall: each choice of each token to one rank, then to those that cut
        the expert; as many as the busiest rank gets. allgather: every token to every rank."""
        ep, etp, moe = self.grid.expert, self.grid.expert_tensor, arch.moe
        if moe is None or ep * etp == 1:
            return 0.0
        tokens = pack.tokens / (self.grid.tensor * self.grid.context)  # sequence parallel: check_moe insists
        token_bytes = tokens * arch.hidden_size * self.width
        if self.megatron.moe_token_dispatcher_type == "allgather":
            wire, calls = 2 * (ep * etp - 1) * token_bytes, 2
        else:
            chosen = moe.experts_per_token * token_bytes * min(self.assumed.expert_load, ep)
            wire, calls = 2 * chosen * ((ep - 1) / ep + (etp - 1)), 2 * ((ep > 1) + (etp > 1))
        return layers * (wire / self._rate(ep * etp) + calls * self.assumed.collective_latency_s)

    def pipeline_s(self, arch: Architecture, pack: Pack) -> float:
        """A send of the hidden states after each chunk."""
        if self.grid.pipeline == 1:
            return 0.0
        shards = self.grid.context * (self.grid.tensor if self.megatron.sequence_parallel else 1)
        sent = pack.tokens * arch.hidden_size * self.width / shards
        span = self.grid.pipeline * self.grid.stage_ranks
        return self.grid.virtual_pipeline * (sent / self._rate(span) + self.assumed.collective_latency_s)

    def data_parallel_s(self, buffers: StageBuffers, forward_s: float, backward_s: float) -> float:
        """Reduce-scatter of gradients and all-gather of parameters (or an all-reduce), less what overlaps: the reduction
        with the last micro-batch's backward, the gather with the next step's first forward."""
        ddp = self.megatron.distributed_data_parallel_config
        gradient_width = 4 if ddp.grad_reduce_in_fp32 or not self.bf16 else 2
        once = self._ring_s(buffers.dense, self.grid.replicas) + self._ring_s(
            buffers.experts, self.grid.expert_replicas
        )
        distributed = self.megatron.optimizer.use_distributed_optimizer
        reduce_s = once * gradient_width * (1 if distributed else 2)
        gather_s = once * self.width if distributed else 0.0
        if ddp.overlap_grad_reduce:
            reduce_s = max(0.0, reduce_s - backward_s)
        if ddp.overlap_param_gather:
            gather_s = max(0.0, gather_s - forward_s)
        return reduce_s + gather_s

    def _ring_s(self, buffers: tuple[Buffer, ...], ranks: int) -> float:
        """Seconds for a byte of every element; such ranks are spread over the whole stage."""
        elements = sum(buffer.elements for buffer in buffers)
        return (ranks - 1) / ranks * elements / self._rate(self.grid.stage_ranks)

    def _rate(self, span: int) -> float:
        """Bytes/s of one GPU in a group that spans `span` consecutive ranks: NVLink inside a node, else the network."""
        if span <= self.assumed.gpus_per_node:
            return self.gpu.nvlink_bytes_per_s * self.assumed.nvlink_efficiency
        return self.gpu.network_bytes_per_s * self.assumed.network_efficiency
