"""Options that other options, or the model, leave without effect: accepted, since files carry them along, with a note."""

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


def idle_notes(cfg: Config) -> list[str]:
    """One line for each option that is not at its default and can change nothing in this config.

    Settings of a part that is switched off as a whole (`wandb_enabled: false`, `checkpointing.enabled: false`) get no
    line: they count once it is switched on.
    """
    usual = Config(policy=PolicyConfig(model_name="", tokenizer=TokenizerConfig(name="")))
    notes = []
    for path, reason in _idle(cfg):
        value = value_at(cfg, path)
        if value != value_at(usual, path):
            notes.append(f"{path}: {value!r} has no effect: {reason}")
    return notes


def _idle(cfg: Config) -> Iterator[tuple[str, str]]:
    """Each option without effect in `cfg`, and why."""
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
    if cfg.data.num_workers > 1:
        yield "data.num_workers", "one background thread packs ahead, as with 1, and that is enough"
    if not cfg.data.val_data_paths:
        for name in ("val_batches", "val_global_batch_size", "val_at_end"):
            yield f"dpo.{name}", "there is no validation set in data.val_data_paths"


def unused_by_model(cfg: Config, arch: Architecture) -> list[str]:
    """One note for each key about experts that was set for a model without any, and one for dropout."""
    notes = []
    if arch.dropout:
        keys = " and ".join(arch.dropout)
        notes.append(f"config.json: no effect of {keys}: log-probabilities are compared without dropout")
    if arch.experts is not None:
        return notes
    given, usual = cfg.policy.megatron_cfg, MegatronConfig()
    return notes + [
        f"{_MEG}.{name}: {getattr(given, name)!r} has no effect: {arch.hf_class} has no experts"
        for name in (field.name for field in dataclasses.fields(MegatronConfig))
        if name.startswith(("moe_", "freeze_moe_")) and getattr(given, name) != getattr(usual, name)
    ]
