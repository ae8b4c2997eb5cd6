"""From the config to megatron-core's DistributedDataParallel, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megadpo.config.known import INSTALL
from megadpo.config.problems import Problem
from megadpo.config.schema_policy import PolicyConfig
from megadpo.model.transformer_config import DTYPES
from megadpo.optimizer.adam import choose_adam, use_adam
from megadpo.optimizer.step import use_norm_without_waits
from megadpo.parallel.device import why_missing


def wrap_for_training(chunks: Sequence[MegatronModule], policy: PolicyConfig) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers, which are summed over data-parallel ranks when gradients are finalised.

    Summed, not averaged: `calculate_per_token_loss` in the TransformerConfig sets DDP's scaling to 1, and the loss is
    already divided by the pairs of the global batch.
    """
    ddp, optimizer = policy.megatron_cfg.distributed_data_parallel_config, policy.megatron_cfg.optimizer
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=ddp.grad_reduce_in_fp32,
        overlap_grad_reduce=ddp.overlap_grad_reduce,
        overlap_param_gather=ddp.overlap_param_gather,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
    )
    # Buckets exist to begin a reduction early; chunks after the first one finish early anyway.
    return [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]


def machine_problems(policy: PolicyConfig, device: torch.device) -> list[Problem]:
    """What the optimizer needs by the config and this machine lacks; empty where nothing is missing."""
    megatron, optimizer = policy.megatron_cfg, policy.megatron_cfg.optimizer
    has_cuda = device.type == "cuda"
    has_te = has_cuda and why_missing("transformer_engine") is None
    te = INSTALL
    problems = []
    if optimizer.adam_impl == "transformer_engine" and not has_te:
        reason = why_missing("transformer_engine") if has_cuda else "no CUDA device"
        where = "policy.megatron_cfg.optimizer.adam_impl"
        expected = f"torch or auto: Transformer Engine can't be used here: {reason}"
        problems.append(Problem(where, "transformer_engine", expected, f"set it to auto, or {te}"))
    where = "policy.megatron_cfg.optimizer.use_precision_aware_optimizer"
    if optimizer.use_precision_aware_optimizer and not has_cuda:
        problems.append(
            Problem(where, True, "false on a machine without CUDA: its kernels are CUDA's", "set it to false")
        )
    elif optimizer.use_precision_aware_optimizer and not optimizer.optimizer_cpu_offload and not has_te:
        expected = "false without Transformer Engine, whose FusedAdam it is"
        problems.append(Problem(where, True, expected, f"{te}, or set it to false"))
    selective = megatron.activation_checkpointing and megatron.recompute_granularity == "selective"
    if selective and "layernorm" in megatron.recompute_modules and has_cuda and not has_te:
        where, modules = "policy.megatron_cfg.recompute_modules", ", ".join(megatron.recompute_modules)
        expected = "no layernorm without Transformer Engine, which megatron-core 0.16.1 then asks about float8"
        problems.append(Problem(where, modules, expected, f"{te}, or remove layernorm"))
    return problems


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], policy: PolicyConfig, device: torch.device
) -> MegatronOptimizer:
    """AdamW (or SGD) with float32 main parameters; biases and norms get no weight decay (megatron-core's default).

    Collectives: an all-gather of parameter-group keys over the world.
    """
    optimizer = policy.megatron_cfg.optimizer
    use_adam(choose_adam(optimizer, device)[0])
    use_norm_without_waits()
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer=optimizer.optimizer,
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            sgd_momentum=optimizer.sgd_momentum,
            bf16=policy.precision == "bfloat16",
            params_dtype=torch.bfloat16 if policy.precision == "bfloat16" else torch.float32,
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
            use_precision_aware_optimizer=optimizer.use_precision_aware_optimizer,
            exp_avg_dtype=DTYPES[optimizer.exp_avg_dtype],
            exp_avg_sq_dtype=DTYPES[optimizer.exp_avg_sq_dtype],
            optimizer_cpu_offload=optimizer.optimizer_cpu_offload,
            optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
            overlap_cpu_optimizer_d2h_h2d=optimizer.overlap_cpu_optimizer_d2h_h2d,
            overlap_param_gather=policy.megatron_cfg.distributed_data_parallel_config.overlap_param_gather,
            clip_grad=policy.max_grad_norm,
        ),
        list(chunks),
        use_gloo_process_groups=device.type == "cuda",  # as in parallel/groups.py; a plan has none on any machine
    )


def build_scheduler(optimizer: MegatronOptimizer, policy: PolicyConfig, total_steps: int) -> OptimizerParamScheduler:
    """Warm-up, then constant, linear or cosine decay, counted in optimizer steps; sets the first step's rate."""
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
        # megatron-core asserts that decay ends after warm-up; a constant rate never looks at the number.
        lr_decay_steps=max(decay_steps, schedule.lr_warmup_iters + 1),
        lr_decay_style=schedule.lr_decay_style,
        start_wd=schedule.start_weight_decay,
        end_wd=schedule.end_weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style=schedule.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run follows its config; load_state only restores the count
    )
