"""Builds megatron-core's DistributedDataParallel, optimizer and learning-rate schedule from the config."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megadpo.config.schema_policy import PolicyConfig
from megadpo.optimizer.step import use_our_norm_and_scale


def wrap_for_training(chunks: Sequence[MegatronModule], policy: PolicyConfig) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers. Finalising sums the gradients over data-parallel ranks.

    They are not averaged: `calculate_per_token_loss` in the TransformerConfig sets DDP's scaling to 1, because the loss is
    divided by the pairs of the global batch already.
    """
    ddp, optimizer = policy.megatron_cfg.distributed_data_parallel_config, policy.megatron_cfg.optimizer
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
    )
    # Buckets let a reduction start early; the backward pass of later chunks ends early anyway
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], policy: PolicyConfig, device: torch.device
) -> MegatronOptimizer:
    """AdamW (or SGD) with float32 main parameters; biases and norms get no weight decay (megatron-core's default).

    Collectives: an all-gather of parameter-group keys over the world.
    """
    optimizer = policy.megatron_cfg.optimizer
    optimizer.kind.install(device.type)
    use_our_norm_and_scale()
    built = get_megatron_optimizer(
        OptimizerConfig(
            optimizer=optimizer.optimizer,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            bf16=policy.precision == "bfloat16",
            params_dtype=torch.bfloat16 if policy.precision == "bfloat16" else torch.float32,
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
            **optimizer.kind.settings(),
            overlap_param_gather=policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather,
            clip_grad=policy.max_grad_norm,
        ),
        list(chunks),
        use_gloo_process_groups=device.type == "cuda",  # as in parallel/groups.py; the planner has none
    )
    for group in built.param_groups if device.type == "cpu" else ():
        if "fused" in group:  # torch's AdamW, SGD: one pass over the memory, without copies of whole tensors
            group["fused"] = True
    return built


def build_scheduler(optimizer: MegatronOptimizer, policy: PolicyConfig, total_steps: int) -> OptimizerParamScheduler:
    """Warm-up, then a constant rate, or linear or cosine decay, in optimizer steps. Sets the rate of the first step."""
    schedule, lr, min_lr = (
        policy.megatron_cfg.scheduler,
        policy.megatron_cfg.optimizer.lr,
        policy.megatron_cfg.optimizer.min_lr,
    )
    decay_steps = schedule.lr_decay_iters or total_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=schedule.lr_warmup_init,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=schedule.lr_warmup_iters,
        # megatron-core asserts that decay ends after warm-up, also for a constant rate
        lr_decay_steps=max(decay_steps, schedule.lr_warmup_iters + 1),
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run uses its config; only the step count is restored
    )
