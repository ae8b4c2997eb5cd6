"""Parameters of a pipeline stage, and megatron-core's buffers for them, by arithmetic, without torch.

A plan takes the parameters from a stage that was built (trace.py). This module gives the same numbers a thousand times
faster, for the layout search. Tests compare both with a real run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadpo.config.architecture import Architecture, Attention, DeltaNet, Experts, Latent, Layer, Mlp
from megadpo.config.grid import Grid
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.optimizer.size import optimizer_bytes_per_element


@dataclass(frozen=True)
class Parameter:
    """One parameter on one rank."""

    elements: int
    shared_embedding: bool = False
    """Tied embeddings with pipeline parallelism; first and last stage both have them."""
    expert: bool = False
    trainable: bool = True
    wide: bool = False
    """In float32 whatever the precision."""


Chunk = Sequence[Parameter]
"""The parameters of one model chunk, in the model's order. The order decides where padding goes."""


def layer_parameters(arch: Architecture, layer: Layer, grid: Grid) -> Iterator[Parameter]:
    """The parameters of one layer on one rank, in the model's order."""
    tp, hidden, one, experts = grid.tensor, arch.hidden_size, layer.attention, layer.feed_forward
    norms = arch.norms.placement
    if norms != "post":
        yield Parameter(hidden)  # input norm
    if isinstance(one, DeltaNet):
        yield from _delta_net(one, hidden, tp)
    elif one.latent is None:
        yield from _attention(one, hidden, tp)
    else:
        yield from _latent_attention(one, one.latent, hidden, tp)
    if norms != "pre":
        yield Parameter(hidden)  # norm after attention
    if norms != "post":
        yield Parameter(hidden)  # norm before the MLP
    if isinstance(experts, Mlp):
        yield from _mlp(experts, hidden, tp)
    else:
        yield from _experts(experts, hidden, grid)
    if norms != "pre":
        yield Parameter(hidden)  # norm after the MLP


def _attention(one: Attention, hidden: int, tp: int) -> Iterator[Parameter]:
    qkv = (one.query_heads + 2 * one.num_kv_heads) * one.head_dim
    if one.sinks:
        yield Parameter(one.num_heads // tp)
    if one.qk_norm in ("head_after_rope", "width"):
        heads = (one.num_heads, one.num_kv_heads) if one.qk_norm == "width" else (1, 1)
        yield from (Parameter(count * one.head_dim) for count in heads)
    yield Parameter(one.num_heads * one.head_dim // tp * hidden)  # attention output
    if one.output_bias:
        yield Parameter(hidden)
    yield Parameter(qkv // tp * hidden)
    if one.qkv_bias:
        yield Parameter(qkv // tp)
    if one.qk_norm == "head":
        yield from [Parameter(one.head_dim)] * 2


def _latent_attention(one: Attention, latent: Latent, hidden: int, tp: int) -> Iterator[Parameter]:
    queries, plain = one.num_heads * one.head_dim // tp, one.head_dim - latent.rope_dim
    if latent.q_rank is None:
        yield Parameter(queries * hidden)
    else:
        yield from (Parameter(size) for size in (latent.q_rank * hidden, latent.q_rank, queries * latent.q_rank))
    yield Parameter((latent.kv_rank + latent.rope_dim) * hidden)
    yield Parameter(latent.kv_rank)  # norm
    yield Parameter(one.num_heads * (plain + one.value_dim) // tp * latent.kv_rank)
    yield Parameter(one.num_heads * one.value_dim // tp * hidden)  # attention output


def _delta_net(one: DeltaNet, hidden: int, tp: int) -> Iterator[Parameter]:
    yield Parameter(one.conv_channels // tp * one.conv_width)
    yield from [Parameter(one.value_heads // tp)] * 2  # decays and their biases
    yield Parameter(one.value_dim)  # norm
    yield Parameter(one.in_channels // tp * hidden)
    yield Parameter(one.value_heads * one.value_dim // tp * hidden)


def _experts(experts: Experts, hidden: int, grid: Grid) -> Iterator[Parameter]:
    yield Parameter(experts.number * hidden)  # router
    if experts.router.correction_bias:
        yield Parameter(experts.number, trainable=False, wide=True)
    if experts.router.bias:
        yield Parameter(experts.number)
    for _ in range(experts.number // grid.expert):
        yield from _mlp(experts.mlp, hidden, grid.expert_tensor, expert=True)
    if experts.shared_ffn_size is not None:
        if experts.shared_gate:
            yield Parameter(hidden)
        yield from _mlp(Mlp(ffn_size=experts.shared_ffn_size), hidden, grid.tensor)


def _mlp(mlp: Mlp, hidden: int, shards: int, *, expert: bool = False) -> Iterator[Parameter]:
    channels = mlp.ffn_size // shards
    for elements, bias in ((2 * channels * hidden, 2 * channels), (channels * hidden, hidden)):
        yield Parameter(elements, expert=expert)
        if mlp.bias:
            yield Parameter(bias, expert=expert)


@dataclass(frozen=True)
class Buffer:
    """One of megatron-core's contiguous buffers of gradients (and, with the distributed optimizer, parameters)."""

    elements: int
    """With padding."""
    shard_elements: tuple[int, ...]
    """For each rank that shares the buffer: elements of its optimizer, without padding."""


@dataclass(frozen=True)
class StageBuffers:
    """The buffers of one rank: for each model chunk one, and one for its experts, which other ranks share."""

    dense: tuple[Buffer, ...]
    experts: tuple[Buffer, ...]

    @property
    def elements(self) -> int:
        return sum(buffer.elements for buffer in (*self.dense, *self.experts))

    def shards(self, grid: Grid, rank: int) -> tuple[int, int]:
        """Elements in the optimizer of rank `rank` of the stage: (not experts, experts)."""
        place = grid.at(rank)
        return (
            sum(buffer.shard_elements[place.replica] for buffer in self.dense),
            sum(buffer.shard_elements[place.expert_replica] for buffer in self.experts),
        )

    def largest_shards(self, grid: Grid) -> tuple[int, int]:
        """`shards` of the rank with the most elements."""
        return max((self.shards(grid, rank) for rank in range(grid.stage_ranks)), key=sum)


def stage_buffers(chunks: Sequence[Chunk], megatron: MegatronConfig, grid: Grid, *, first_stage: bool) -> StageBuffers:
    """The buffers of a stage's trainable parameters. Only the first chunk of the first pipeline stage has buckets, and only
    with overlap_grad_reduce (distributed_data_parallel.py; optimizer/build.py)."""
    overlap = megatron.distributed_data_parallel_config.overlap_grad_reduce

    def of(expert: bool, ranks: int) -> tuple[Buffer, ...]:
        buffers = []
        for number, chunk in enumerate(chunks):
            held = [one for one in chunk if one.trainable and one.expert == expert]
            bucketed = overlap and first_stage and number == 0
            most = max(40_000_000, 1_000_000 * grid.data) if bucketed else math.inf
            if held:
                buffers.append(_buffer(held, ranks, most, megatron.optimizer.use_distributed_optimizer))
        return tuple(buffers)

    return StageBuffers(of(False, grid.replicas), of(True, grid.expert_replicas))


def _buffer(parameters: Sequence[Parameter], ranks: int, bucket: float, distributed: bool) -> Buffer:
    """The layout of megatron-core 0.16.1 (distributed/param_and_grad_buffer.py, `_ParamAndGradBuffer.__init__`).

    With the distributed optimizer every parameter starts at a multiple of 64 elements, every bucket ends at a multiple
    of lcm(ranks, 128), a shared embedding has its own bucket, and each bucket is cut into equal shards.
    """
    if not distributed:
        total = sum(parameter.elements for parameter in parameters)
        return Buffer(total, (total,) * ranks)
    divisor = math.lcm(ranks, 128)
    shards = [0] * ranks
    start = position = 0
    held: list[tuple[int, int]] = []
    for parameter in reversed(parameters):
        position = _up(position, 64)
        if parameter.shared_embedding and held:
            position = start = _close(shards, start, position, held, divisor)
        held.append((position, position + parameter.elements))
        position += parameter.elements
        if parameter.shared_embedding or position - start >= bucket:
            position = start = _close(shards, start, position, held, divisor)
    if held:
        position = _close(shards, start, position, held, divisor)
    return Buffer(position, tuple(shards))


def _close(shards: list[int], start: int, end: int, held: list[tuple[int, int]], divisor: int) -> int:
    """Ends a bucket: adds its parameters' elements to each shard, empties `held`, and returns the padded end."""
    end = _up(end, divisor)
    width = (end - start) // len(shards)
    for first, last in held:
        for rank in range((first - start) // width, min(len(shards), (last - 1 - start) // width + 1)):
            low = start + rank * width
            shards[rank] += max(0, min(last, low + width) - max(first, low))
    held.clear()
    return end


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """Bytes that a rank always uses, for the rank of the stage with the largest optimizer shard."""

    weights: int
    gradients: int
    optimizer: int
    """Main parameters and moments, without Adam's step counts (4 bytes for each parameter tensor)."""
    reference: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference


def static_bytes(
    chunks: Sequence[Chunk],
    reference: Sequence[Chunk],
    buffers: StageBuffers,
    shard_elements: int,
    megatron: MegatronConfig,
    bf16: bool,
) -> StaticBytes:
    """`reference` is empty if there is none. Frozen weights have no buffer, so no padding."""
    width = 2 if bf16 else 4
    padding = 0
    if megatron.optimizer.use_distributed_optimizer:  # the buffer holds the weights too
        padding = buffers.elements - sum(one.elements for chunk in chunks for one in chunk if one.trainable)
    wide_gradients = megatron.distributed_data_parallel_config.grad_reduce_in_fp32 or not bf16
    return StaticBytes(
        weights=_bytes(chunks, width) + padding * width,
        gradients=buffers.elements * (4 if wide_gradients else 2),
        optimizer=shard_elements * optimizer_bytes_per_element(megatron, bf16),
        reference=_bytes(reference, width),
    )


def _bytes(chunks: Sequence[Chunk], width: int) -> int:
    return sum(one.elements * (4 if one.wide else width) for chunk in chunks for one in chunk)
