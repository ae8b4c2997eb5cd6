"""Rules of optimizer, schedule and precision."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.known import Known, rule
from megadpo.config.problems import Problem

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_SCHED = f"{_MEG}.scheduler"


def _must_equal(where: str, value: object, wanted: object, source: str) -> Iterator[Problem]:
    if value != wanted:
        yield Problem(where, value, f"{wanted!r}, as {source}", f"remove {where}: it follows {source}")


@rule
def _bf16(known: Known) -> Iterator[Problem]:
    bf16 = known.cfg.policy.precision == "bfloat16"
    yield from _must_equal(f"{_OPT}.bf16", known.cfg.policy.megatron_cfg.optimizer.bf16, bf16, "policy.precision")


@rule
def _pipeline_dtype(known: Known) -> Iterator[Problem]:
    where = f"{_MEG}.pipeline_dtype"
    yield from _must_equal(
        where, known.cfg.policy.megatron_cfg.pipeline_dtype, known.cfg.policy.precision, "policy.precision"
    )


@rule
def _clip_grad(known: Known) -> Iterator[Problem]:
    clip = known.cfg.policy.megatron_cfg.optimizer.clip_grad
    yield from _must_equal(f"{_OPT}.clip_grad", clip, known.cfg.policy.max_grad_norm, "policy.max_grad_norm")


@rule
def _rates(known: Known) -> Iterator[Problem]:
    optimizer, schedule = known.cfg.policy.megatron_cfg.optimizer, known.cfg.policy.megatron_cfg.scheduler
    decays, warms_up = schedule.lr_decay_style != "constant", schedule.lr_warmup_iters > 0
    for where, value, is_read in (
        (f"{_OPT}.min_lr", optimizer.min_lr, decays),
        (f"{_SCHED}.lr_warmup_init", schedule.lr_warmup_init, warms_up),
    ):
        if is_read and value > optimizer.lr:
            yield Problem(where, value, f"at most {_OPT}.lr ({optimizer.lr:g})", f"lower it, or raise {_OPT}.lr")


@rule
def _decay(known: Known) -> Iterator[Problem]:
    schedule = known.cfg.policy.megatron_cfg.scheduler
    end, end_name = schedule.lr_decay_iters, f"{_SCHED}.lr_decay_iters"
    if end is None:
        end, end_name = known.cfg.dpo.max_num_steps, "dpo.max_num_steps"
    if schedule.lr_decay_style == "constant" or end is None or schedule.lr_warmup_iters < end:
        return
    where = f"{_SCHED}.lr_warmup_iters"
    expected = f"less than {end_name} ({end}), where the {schedule.lr_decay_style} decay ends"
    yield Problem(where, schedule.lr_warmup_iters, expected, f"lower it, or raise {end_name}")


@rule
def _weight_decay(known: Known) -> Iterator[Problem]:
    schedule, decay = known.cfg.policy.megatron_cfg.scheduler, known.cfg.policy.megatron_cfg.optimizer.weight_decay
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
