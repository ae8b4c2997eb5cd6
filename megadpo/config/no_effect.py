"""Options without effect, because of other options or the model. They are accepted, with a note: files often have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.config.variants import KINDS, value_at

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_SCHED = f"{_MEG}.scheduler"


def no_effect_notes(cfg: Config) -> list[str]:
    """One line for each option that is not at its default and has no effect in this config.

    There is no line for settings of a part that is switched off as a whole (`wandb_enabled: false`,
    `checkpointing.enabled: false`).
    """
    usual = Config(policy=PolicyConfig(model_name="", tokenizer=TokenizerConfig(name="")))
    notes = []
    for path, reason in _without_effect(cfg):
        value = value_at(cfg, path)
        if value != value_at(usual, path):
            notes.append(f"{path}: {value!r} has no effect: {reason}")
    return notes


def _without_effect(cfg: Config) -> Iterator[tuple[str, str]]:
    """(path, reason) of each option without effect in `cfg`."""
    for kind in KINDS:
        if kind.notes_unread:
            yield from ((where, f"{kind.field} is {value_at(cfg, kind.field)}") for where, _, _ in kind.unread(cfg))
    schedule = cfg.policy.megatron_cfg.scheduler
    if schedule.lr_decay_style == "constant":
        for path in (f"{_OPT}.min_lr", f"{_SCHED}.lr_decay_iters"):
            yield path, f"{_SCHED}.lr_decay_style is constant"
    if schedule.lr_warmup_iters == 0:
        yield f"{_SCHED}.lr_warmup_init", f"{_SCHED}.lr_warmup_iters is 0"
    if cfg.policy.sequence_packing.enabled:
        reason = "with policy.sequence_packing.enabled, train_mb_tokens decides"
        for path in ("policy.train_micro_batch_size", "dpo.val_micro_batch_size"):
            yield path, reason
    else:
        yield "policy.sequence_packing.share_prompt", "policy.sequence_packing.enabled is false"
    if not (cfg.policy.sequence_packing.enabled and cfg.policy.sequence_packing.share_prompt):
        yield "data.group_prompts", "each pair's prompt is computed with each answer"
    if cfg.dpo.preference_loss_weight == 0:
        for name in ("ld_alpha", "use_weighting"):
            yield f"dpo.{name}", "dpo.preference_loss_weight is 0"
    if cfg.policy.device == "cpu":
        yield "logger.monitor_gpus", "policy.device is cpu"
    if cfg.data.num_workers > 1:
        yield "data.num_workers", "one background thread packs ahead, as with 1, and that is enough"
    if not cfg.data.val_names:
        for name in ("val_batches", "val_global_batch_size", "val_at_end"):
            yield f"dpo.{name}", "there is no validation set in data.val_data_paths"


def dropout_notes(arch: Architecture) -> list[str]:
    """A note if the model's config.json asks for dropout."""
    if not arch.dropout:
        return []
    keys = " and ".join(arch.dropout)
    return [f"config.json: {keys}: no effect: dropout is never applied, since log-probabilities are compared"]


def warmup_notes(cfg: Config, total_steps: int) -> list[str]:
    """A note if the run ends while the learning rate still rises. A step's rate is that of the updates before it."""
    warmup, lr = cfg.policy.megatron_cfg.scheduler.lr_warmup_iters, cfg.policy.megatron_cfg.optimizer.lr
    if total_steps > warmup:
        return []
    ends = f"the run ends after {total_steps} steps, before the learning rate reaches {lr:g}"
    return [f"{_SCHED}.lr_warmup_iters: {warmup}: {ends}; lower it, or train for more steps"]


_MODULES = ("moe", "shared_experts")


def without_experts(cfg: Config, *archs: Architecture) -> Config:
    """If none of `archs` (policy and reference) has experts: `cfg` with all options of experts at their defaults, and a note.
    Else `cfg`."""
    if any(arch.experts is not None for arch in archs):
        return cfg
    given, usual = cfg.policy.megatron_cfg, MegatronConfig()
    names = [field.name for field in dataclasses.fields(MegatronConfig)]
    of_experts = [name for name in names if name.startswith(("moe_", "freeze_moe_"))]
    changes = {name: getattr(usual, name) for name in of_experts if getattr(given, name) != getattr(usual, name)}
    unread = [f"{name} {getattr(given, name)!r}" for name in changes]
    unread += [f"{one.where.removeprefix(f'{_MEG}.')} {one.value!r}" for one in cfg.refused_with_experts]
    if given.activation_checkpointing and given.recompute_granularity == "selective":
        kept = tuple(one for one in given.recompute_modules if one not in _MODULES)
        if kept != given.recompute_modules:
            unread.append(f"recompute_modules {', '.join(one for one in given.recompute_modules if one in _MODULES)}")
            changes |= {"recompute_modules": kept} if kept else {"activation_checkpointing": False}
    if not unread:
        return cfg
    policy = dataclasses.replace(cfg.policy, megatron_cfg=dataclasses.replace(given, **changes))
    note = f"{_MEG}: {', '.join(unread)}: no effect: {archs[0].hf_class} has no experts"
    return dataclasses.replace(cfg, policy=policy, notes=(*cfg.notes, note), refused_with_experts=())
