"""What must hold between the fields of optimizer, schedule and number formats."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.problems import Problem
from megadpo.config.rules import rule
from megadpo.config.schema import Config

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_SCHED = f"{_MEG}.scheduler"


def _must_equal(where: str, value: object, wanted: object, source: str) -> Iterator[Problem]:
    if value != wanted:
        yield Problem(where, value, f"{wanted!r}, as {source}", f"remove {where}: it follows {source}")


@rule
def _bf16(cfg: Config) -> Iterator[Problem]:
    bf16 = cfg.policy.precision == "bfloat16"
    yield from _must_equal(f"{_OPT}.bf16", cfg.policy.megatron_cfg.optimizer.bf16, bf16, "policy.precision")


@rule
def _pipeline_dtype(cfg: Config) -> Iterator[Problem]:
    where = f"{_MEG}.pipeline_dtype"
    yield from _must_equal(where, cfg.policy.megatron_cfg.pipeline_dtype, cfg.policy.precision, "policy.precision")


@rule
def _clip_grad(cfg: Config) -> Iterator[Problem]:
    clip = cfg.policy.megatron_cfg.optimizer.clip_grad
    yield from _must_equal(f"{_OPT}.clip_grad", clip, cfg.policy.max_grad_norm, "policy.max_grad_norm")


@rule
def _precision_aware(cfg: Config) -> Iterator[Problem]:
    optimizer, where = cfg.policy.megatron_cfg.optimizer, f"{_OPT}.use_precision_aware_optimizer"
    if not optimizer.use_precision_aware_optimizer:
        return
    saves = cfg.checkpointing.enabled and cfg.checkpointing.save_optimizer
    name, distributed = optimizer.optimizer, f"{_OPT}.use_distributed_optimizer"
    unproved = "false while checkpoints save the optimizer: that this state resumes is not proved yet"
    for broken, expected, other in (
        (name != "adam", f"false with {_OPT}.optimizer {name}", f"{_OPT}.optimizer: adam"),
        (not optimizer.use_distributed_optimizer, f"false unless {distributed} is true", f"{distributed}: true"),
        (cfg.policy.device == "cpu", "false on policy.device cpu: its kernels are CUDA's", "policy.device: cuda"),
        (saves, unproved, "checkpointing.save_optimizer: false"),
    ):
        if broken:
            yield Problem(where, True, expected, f"set it to false, or {other}")


@rule
def _distributed_optimizer(cfg: Config) -> Iterator[Problem]:
    optimizer, where = cfg.policy.megatron_cfg.optimizer, f"{_OPT}.use_distributed_optimizer"
    if (
        optimizer.use_precision_aware_optimizer or not optimizer.use_distributed_optimizer
    ):  # the former has its own rule
        return
    if optimizer.optimizer != "adam":
        expected = f"false with {_OPT}.optimizer {optimizer.optimizer}: megatron-core shards Adam's state only"
        yield Problem(where, True, expected, f"set it to false, or {_OPT}.optimizer: adam")


@rule
def _optimizer_state(cfg: Config) -> Iterator[Problem]:
    optimizer = cfg.policy.megatron_cfg.optimizer
    aware, offload = optimizer.use_precision_aware_optimizer, optimizer.optimizer_cpu_offload
    if not aware:
        for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(optimizer, name) != "float32":
                fix = f"set it to float32, or {_OPT}.use_precision_aware_optimizer: true"
                yield Problem(
                    f"{_OPT}.{name}", getattr(optimizer, name), "float32 without the precision-aware one", fix
                )
    if offload and not aware:
        fix = f"set it to false, or {_OPT}.use_precision_aware_optimizer: true"
        expected = "false without use_precision_aware_optimizer, whose code it shares in megatron-core"
        yield Problem(f"{_OPT}.optimizer_cpu_offload", True, expected, fix)
    fraction = optimizer.optimizer_offload_fraction
    if offload != (fraction > 0):
        expected = "more than 0 with optimizer_cpu_offload" if offload else "0 without optimizer_cpu_offload"
        fix = f"set it to {'1.0' if offload else '0.0'}, or {_OPT}.optimizer_cpu_offload: {str(not offload).lower()}"
        yield Problem(f"{_OPT}.optimizer_offload_fraction", fraction, expected, fix)
    if optimizer.overlap_cpu_optimizer_d2h_h2d and not offload:
        where = f"{_OPT}.overlap_cpu_optimizer_d2h_h2d"
        yield Problem(where, True, "false without optimizer_cpu_offload", "set it to false")


@rule
def _rates(cfg: Config) -> Iterator[Problem]:
    optimizer, schedule = cfg.policy.megatron_cfg.optimizer, cfg.policy.megatron_cfg.scheduler
    for where, value in ((f"{_OPT}.min_lr", optimizer.min_lr), (f"{_SCHED}.lr_warmup_init", schedule.lr_warmup_init)):
        if value > optimizer.lr:
            yield Problem(where, value, f"at most {_OPT}.lr ({optimizer.lr:g})", f"lower it, or raise {_OPT}.lr")


@rule
def _decay(cfg: Config) -> Iterator[Problem]:
    schedule = cfg.policy.megatron_cfg.scheduler
    end, end_name = schedule.lr_decay_iters, f"{_SCHED}.lr_decay_iters"
    if end is None:
        end, end_name = cfg.dpo.max_num_steps, "dpo.max_num_steps"
    if schedule.lr_decay_style == "constant" or end is None or schedule.lr_warmup_iters < end:
        return
    where = f"{_SCHED}.lr_warmup_iters"
    expected = f"less than {end_name} ({end}), where the {schedule.lr_decay_style} decay ends"
    yield Problem(where, schedule.lr_warmup_iters, expected, f"lower it, or raise {end_name}")


@rule
def _weight_decay(cfg: Config) -> Iterator[Problem]:
    schedule, decay = cfg.policy.megatron_cfg.scheduler, cfg.policy.megatron_cfg.optimizer.weight_decay
    start, end = schedule.start_weight_decay, schedule.end_weight_decay
    if schedule.weight_decay_incr_style == "constant":
        fix = f"remove it, or set {_SCHED}.weight_decay_incr_style: linear or cosine"
        for name, value in (("start_weight_decay", start), ("end_weight_decay", end)):
            if value != decay:
                expected = f"{_OPT}.weight_decay ({decay:g}) with weight_decay_incr_style constant"
                yield Problem(f"{_SCHED}.{name}", value, expected, fix)
    elif end < start:
        fix = "raise it: megatron-core's schedule only increases weight decay"
        yield Problem(f"{_SCHED}.end_weight_decay", end, f"at least start_weight_decay ({start:g})", fix)
