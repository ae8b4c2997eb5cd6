"""Builds this rank's part of the policy or the reference."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_layer import MoELayer

from megadpo.config.architecture import Architecture, Experts
from megadpo.config.known import Known
from megadpo.config.schema import Config
from megadpo.config.schema_policy import PolicyConfig
from megadpo.config.variants import ATTENTION_KERNELS, LAYER_IMPLEMENTATIONS, LOGPROB_KERNELS
from megadpo.model.attention import PackedAttention
from megadpo.model.delta_net import GatedDeltaNet
from megadpo.model.freeze import freeze_routers
from megadpo.model.gpt import ModelParts, PairModel
from megadpo.model.moe_balance import LoadBalance
from megadpo.model.rope import RotaryTable
from megadpo.model.transformer_config import transformer_config
from megadpo.parallel import ParallelContext, machine


def build_model(
    arch: Architecture, policy: PolicyConfig, parallel: ParallelContext, *, frozen: bool
) -> list[PairModel]:
    """The chunks of this rank's stage (one, without a virtual pipeline) on its device. Their weights are allocated, but not
    loaded.

    frozen: for the reference, which has no gradients: no recomputation and no gradient buffers. Collectives:
    megatron-core's sum of tied embeddings over the embedding group at construction. Raises ConfigError if this machine
    can't run the config's layers or kernels.
    """
    device, megatron = parallel.device, policy.megatron_cfg
    known = Known(cfg=Config(policy=policy), arch=arch, machine=machine(device))
    layers = LAYER_IMPLEMENTATIONS.choose(known)
    config = transformer_config(arch, policy, device, known=known, layers=layers, recompute=not frozen)
    with_gradients = not frozen and not megatron.peft.enabled  # of the weights themselves
    fused = megatron.apply_rope_fusion and layers.fuses_rope
    rotaries = {attention.rotary for attention in arch.attentions if attention.rotary is not None}
    parts = ModelParts(
        layers=layers.modules(fuse_weight_gradient=with_gradients and layers.fuses_weight_gradient(megatron)),
        joined_qkv=megatron.fused_single_qkv_rope,
        kernel=ATTENTION_KERNELS.choose(known),
        rotaries={one: RotaryTable(one, device, fused=fused) for one in rotaries},
        head=LOGPROB_KERNELS.choose(known),
        logprob_chunk_tokens=policy.logprob_chunk_size,
        balance=load_balance(arch, policy, parallel),
        frozen=frozen,
    )
    chunks = []
    for number in range(parallel.grid.virtual_pipeline):
        chunk = PairModel(arch, config, parallel, parts, number)
        chunk.to(device)
        mark_sharded_parameters(chunk)
        mark_expert_parameters(chunk)
        if megatron.freeze_moe_router:
            freeze_routers(chunk)
        if frozen:
            chunk.requires_grad_(False)
            chunk.eval()
        chunks.append(chunk)
    return chunks


def load_balance(arch: Architecture, policy: PolicyConfig, parallel: ParallelContext) -> LoadBalance | None:
    """The load-balancing loss for the experts of `arch`; None for a dense model."""
    if arch.experts is None:
        return None
    megatron = policy.megatron_cfg
    coefficient = arch.experts.aux_loss_coef if megatron.moe_aux_loss_coeff is None else megatron.moe_aux_loss_coeff
    layers = [number for number, layer in enumerate(arch.layers) if isinstance(layer.feed_forward, Experts)]
    return LoadBalance(megatron.moe_router_load_balancing_type, coefficient, layers, parallel.device)


def mark_expert_parameters(model: torch.nn.Module) -> None:
    """Mark the experts' parameters for DDP and the optimizer: their gradients are reduced over the ranks with the same
    expert.

    megatron-core's layers.py does so only with `expert_model_parallel_size` > 1. With 1, and experts that tensor
    parallelism doesn't cut (expert_tensor_parallel_size 1), each rank would keep the gradient of its own tokens, and the
    copies would drift apart. The mark as a shard makes the experts of every rank count in the gradient norm, not only
    those of tensor-parallel rank 0.
    """
    for module in model.modules():
        if isinstance(module, MoELayer):
            for parameter in module.experts.parameters():
                parameter.allreduce = False
                parameter.tensor_model_parallel = True
                # megatron-core marks biases; it would sum their gradients over ranks with other experts
                parameter.sequence_parallel = False


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether it is a parameter of an expert (or this rank's part of one), by the mark above."""
    return not getattr(parameter, "allreduce", True)


def mark_sharded_parameters(model: torch.nn.Module) -> None:
    """Mark the parameters that are tensor-parallel shards, not copies.

    megatron-core's layers.py sets these marks only when it initialises weights (`perform_initialization`), which is off
    here. Without them the gradient norm would count one rank's shard as the whole parameter, and clipping would be wrong.
    """
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            shards = [(module.weight, 1)]
        elif isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            shards = [(module.weight, 0), (getattr(module, "bias", None), 0)]
        elif isinstance(module, PackedAttention):
            shards = [(module.softmax_offset, 0)]
        elif isinstance(module, GatedDeltaNet):
            shards = [(getattr(module, name), 0) for name in module.SHARDS]
        else:
            continue
        for parameter, dim in shards:
            if parameter is not None and not getattr(parameter, "tensor_model_parallel", False):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def count_parameters(chunks: Iterable[torch.nn.Module]) -> int:
    """Parameters on this rank."""
    return sum(p.numel() for chunk in chunks for p in chunk.parameters())
