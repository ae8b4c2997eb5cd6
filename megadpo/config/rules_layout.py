"""What must hold between the fields that lay a model out over ranks, whatever the model and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megadpo.config.problems import Problem
from megadpo.config.rules import rule
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_DDP = f"{_MEG}.distributed_data_parallel_config"


@rule
def _shares_of_a_pack(cfg: Config) -> Iterator[Problem]:
    megatron, multiple = cfg.policy.megatron_cfg, cfg.policy.make_sequence_length_divisible_by
    tp, cp = megatron.tensor_model_parallel_size, megatron.context_parallel_size
    if megatron.sequence_parallel and tp == 1:
        fix = f"set it to false, or raise {_MEG}.tensor_model_parallel_size"
        yield Problem(f"{_MEG}.sequence_parallel", True, "false with tensor_model_parallel_size 1", fix)
    shares = {"context_parallel_size": cp, "tensor_model_parallel_size": tp if megatron.sequence_parallel else 1}
    needed = math.prod(shares.values())
    if multiple % needed:
        where = "policy.make_sequence_length_divisible_by"
        named = " x ".join(f"{name} ({count})" for name, count in shares.items() if count > 1)
        expected = f"a multiple of {named}: each of these ranks holds as many tokens of a pack"
        yield Problem(where, multiple, expected, f"remove it, or set it to {needed}")


@rule
def _smallest_pack(cfg: Config) -> Iterator[Problem]:
    packing, multiple = cfg.policy.sequence_packing, cfg.policy.make_sequence_length_divisible_by
    if packing.enabled and packing.train_mb_tokens < multiple:
        where = "policy.sequence_packing.train_mb_tokens"
        expected = f"at least {multiple}, policy.make_sequence_length_divisible_by, to which packs are padded"
        yield Problem(where, packing.train_mb_tokens, expected, f"raise it to {multiple} or more")


@rule
def _pipeline_stages(cfg: Config) -> Iterator[Problem]:
    megatron = cfg.policy.megatron_cfg
    if megatron.pipeline_model_parallel_size > 1:
        return
    if megatron.virtual_pipeline_model_parallel_size > 1:
        where = f"{_MEG}.virtual_pipeline_model_parallel_size"
        fix = f"set it to 1, or raise {_MEG}.pipeline_model_parallel_size"
        yield Problem(
            where, megatron.virtual_pipeline_model_parallel_size, "1 with pipeline_model_parallel_size 1", fix
        )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        value = getattr(megatron, name)
        if value is not None:
            fix = f"set it to null, or raise {_MEG}.pipeline_model_parallel_size"
            yield Problem(f"{_MEG}.{name}", value, "null with pipeline_model_parallel_size 1", fix)


@rule
def _recomputation(cfg: Config) -> Iterator[Problem]:
    """What the granularity gives no effect; megatron-core refuses the numbers too (transformer_config.py:1180)."""
    megatron, usual = cfg.policy.megatron_cfg, MegatronConfig()
    if not megatron.activation_checkpointing:
        return
    if megatron.recompute_granularity == "selective" and not megatron.recompute_modules:
        fix = f"name a module, such as core_attn, or set {_MEG}.activation_checkpointing: false"
        yield Problem(f"{_MEG}.recompute_modules", [], "what to recompute, with activation_checkpointing", fix)
    unused = {"selective": ("recompute_method", "recompute_num_layers"), "full": ("recompute_modules",)}
    for name in unused[megatron.recompute_granularity]:
        value, default = getattr(megatron, name), getattr(usual, name)
        if value != default:
            other = "full" if megatron.recompute_granularity == "selective" else "selective"
            expected = (
                f"{default!r}, the default: recompute_granularity {megatron.recompute_granularity} has no use for it"
            )
            yield Problem(f"{_MEG}.{name}", value, expected, f"remove it, or set {_MEG}.recompute_granularity: {other}")


@rule
def _load_balancing(cfg: Config) -> Iterator[Problem]:
    megatron = cfg.policy.megatron_cfg
    kind = megatron.moe_router_load_balancing_type
    if kind == "none":
        for name in ("moe_per_layer_logging", "moe_aux_loss_coeff"):
            if getattr(megatron, name):
                fix = f"set {_MEG}.moe_router_load_balancing_type: aux_loss or seq_aux_loss, or remove it"
                yield Problem(f"{_MEG}.{name}", getattr(megatron, name), "nothing to weigh or log with type none", fix)
    elif megatron.freeze_moe_router:
        fix = f"set it to none, or {_MEG}.freeze_moe_router: false"
        expected = "none with freeze_moe_router true: a frozen router cannot learn to balance"
        yield Problem(f"{_MEG}.moe_router_load_balancing_type", kind, expected, fix)


@rule
def _overlap(cfg: Config) -> Iterator[Problem]:
    ddp = cfg.policy.megatron_cfg.distributed_data_parallel_config
    if not ddp.overlap_param_gather:
        return
    for needed, there in (
        (f"{_OPT}.use_distributed_optimizer", cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer),
        (f"{_DDP}.overlap_grad_reduce", ddp.overlap_grad_reduce),
    ):
        if not there:
            fix = f"set it to false, or {needed}: true"
            yield Problem(f"{_DDP}.overlap_param_gather", True, f"false unless {needed} is true", fix)
