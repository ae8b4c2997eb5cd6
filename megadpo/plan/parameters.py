"""Parameters of a pipeline stage and what megatron-core makes of them, by arithmetic alone: no torch.

The plan itself reads the parameters off a stage that was really built (trace.py); this gives the same numbers a
thousand times faster, for the search over layouts. Tests hold the two, and a real run, to each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.schema_megatron import MegatronConfig


@dataclass(frozen=True)
class Parameter:
    """One parameter on one rank."""

    elements: int
    shared_embedding: bool = False
    """Tied embeddings under pipeline parallelism: first and last stage each hold them."""


def stage_parameters(arch: Architecture, *, tp: int, layers: int, first: bool, last: bool) -> list[Parameter]:
    """In the model's own order, which decides where padding goes."""
    tied = arch.tie_word_embeddings and first != last
    table = Parameter(arch.vocab_size // tp * arch.hidden_size, shared_embedding=tied)
    found = [table] if first else []
    found += [Parameter(count) for _ in range(layers) for count in _layer(arch, tp)]
    if last:
        found.append(Parameter(arch.hidden_size))
        if not (arch.tie_word_embeddings and first):
            found.append(table)
    return found


def _layer(arch: Architecture, tp: int) -> Iterator[int]:
    hidden, qkv = arch.hidden_size, (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
    yield hidden  # input norm
    yield arch.num_heads * arch.head_dim // tp * hidden  # attention output
    yield qkv // tp * hidden
    if arch.qkv_bias:
        yield qkv // tp
    if arch.qk_norm:
        yield from (arch.head_dim, arch.head_dim)
    yield hidden  # norm before the MLP
    yield 2 * arch.ffn_hidden_size // tp * hidden
    yield arch.ffn_hidden_size // tp * hidden


@dataclass(frozen=True)
class Buffer:
    """megatron-core's contiguous buffer of a stage's gradients (and, with the distributed optimizer, parameters)."""

    elements: int
    """Padding included."""
    shard_elements: tuple[int, ...]
    """Elements that each data-parallel rank's optimizer holds, padding excluded."""


def buffer_of(parameters: Sequence[Parameter], megatron: MegatronConfig, *, dp: int, first_stage: bool) -> Buffer:
    """As megatron-core 0.16.1 lays it out (distributed/param_and_grad_buffer.py, `_ParamAndGradBuffer.__init__`).

    With the distributed optimizer every parameter starts at a multiple of 64 elements, every bucket ends at a multiple
    of lcm(dp, 128), a shared embedding has a bucket of its own, and each bucket is cut into dp equal shards. Buckets
    exist only on the first pipeline stage and with overlap_grad_reduce.
    """
    total = sum(parameter.elements for parameter in parameters)
    if not megatron.optimizer.use_distributed_optimizer:
        return Buffer(total, (total,) * dp)
    overlap = megatron.distributed_data_parallel_config.overlap_grad_reduce
    most = max(40_000_000, 1_000_000 * dp) if overlap and first_stage else math.inf
    divisor = math.lcm(dp, 128)
    shards = [0] * dp
    start = position = 0
    held: list[tuple[int, int]] = []
    for parameter in reversed(parameters):
        position = _up(position, 64)
        if parameter.shared_embedding and held:
            position = start = _close(shards, start, position, held, divisor)
        held.append((position, position + parameter.elements))
        position += parameter.elements
        if parameter.shared_embedding or position - start >= most:
            position = start = _close(shards, start, position, held, divisor)
    if held:
        position = _close(shards, start, position, held, divisor)
    return Buffer(position, tuple(shards))


def _close(shards: list[int], start: int, end: int, held: list[tuple[int, int]], divisor: int) -> int:
    """Ends a bucket: counts what each shard holds of its parameters, empties `held`, returns the padded end."""
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
    """What a rank holds all the time, in bytes; the largest over its data-parallel peers."""

    weights: int
    gradients: int
    optimizer: int
    """Main parameters and moments. Adam's step counts, 4 bytes a parameter tensor, are left out."""
    reference: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference


def static_bytes(
    parameters: Sequence[Parameter],
    reference: Sequence[Parameter],
    buffer: Buffer,
    megatron: MegatronConfig,
    bf16: bool,
) -> StaticBytes:
    """`reference` is empty where there is none. Frozen weights have no buffer, so no padding."""
    width = 2 if bf16 else 4
    distributed = megatron.optimizer.use_distributed_optimizer
    weights = buffer.elements if distributed else sum(parameter.elements for parameter in parameters)
    wide_gradients = megatron.distributed_data_parallel_config.grad_reduce_in_fp32 or not bf16
    return StaticBytes(
        weights=weights * width,
        gradients=buffer.elements * (4 if wide_gradients else 2),
        optimizer=max(buffer.shard_elements) * optimizer_bytes_per_element(megatron, bf16),
        reference=sum(parameter.elements for parameter in reference) * width,
    )


def optimizer_bytes_per_element(megatron: MegatronConfig, bf16: bool) -> int:
    """float32 main parameter (only of bfloat16 weights), and Adam's two moments or SGD's momentum."""
    optimizer = megatron.optimizer
    moments = 8 if optimizer.optimizer == "adam" else 4 * (optimizer.sgd_momentum > 0)
    return moments + (4 if bf16 else 0)
