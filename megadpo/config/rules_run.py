"""Rules of loss, data, kernels, checkpoints and cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megadpo.config.known import Known, rule
from megadpo.config.metric import METRICS, parse_duration_s, parse_metric_name
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import HOLDOUT


@rule
def _some_loss(known: Known) -> Iterator[Problem]:
    if known.cfg.dpo.preference_loss_weight == 0 and known.cfg.dpo.sft_loss_weight == 0:
        fix = "set dpo.preference_loss_weight: 1, or dpo.sft_loss_weight: 1 for SFT"
        yield Problem("dpo.preference_loss_weight", 0.0, "a positive loss weight, this one or sft_loss_weight", fix)


@rule
def _reference(known: Known) -> Iterator[Problem]:
    reference = known.cfg.dpo.reference
    if reference.mode != "none":
        return
    if known.cfg.dpo.preference_loss_weight != 0 and known.cfg.dpo.loss.reads_reference:
        fix = "set dpo.reference.mode: resident, or dpo.preference_loss_weight: 0"
        yield Problem("dpo.reference.mode", "none", "resident, since the preference loss needs a reference", fix)
    if reference.model_name is not None:
        fix = "set dpo.reference.mode: resident, or remove the name"
        yield Problem("dpo.reference.model_name", reference.model_name, "null with dpo.reference.mode none", fix)


@rule
def _reference_cache(known: Known) -> Iterator[Problem]:
    reference = known.cfg.dpo.reference
    if reference.cache_dir is not None and reference.mode != "cached":
        fix = "set dpo.reference.mode: cached, or remove the folder"
        yield Problem("dpo.reference.cache_dir", reference.cache_dir, f"null with mode {reference.mode}", fix)


@rule
def _joined_projection(known: Known) -> Iterator[Problem]:
    where, machine, arch = "policy.megatron_cfg.fused_single_qkv_rope", known.machine, known.arch
    if not known.cfg.policy.megatron_cfg.fused_single_qkv_rope:
        return
    if known.device == "cpu":
        yield Problem(where, True, "false on the device cpu: its kernel is for CUDA", "set it to false")
    elif machine is not None and (reason := machine.why_missing("triton")) is not None:
        yield Problem(where, True, f"false without Triton: {reason}", "set it to false, or pip install triton")
    if arch is not None and not any(one.turns_projection for one in arch.attentions):
        expected = f"false for {arch.hf_class}: more than RoPE stands between its projections and attention"
        yield Problem(where, True, expected, "set it to false")


@rule
def _input_length(known: Known) -> Iterator[Problem]:
    length, longest = known.cfg.data.max_input_seq_length, known.cfg.policy.max_total_sequence_length
    if length > longest:
        expected = f"at most policy.max_total_sequence_length ({longest})"
        yield Problem("data.max_input_seq_length", length, expected, "remove it, or raise the other")


SHORTEST_LIMIT = 3
"""BOS, one prompt token, one answer token: truncation leaves at least these."""


@rule
def _shortest_limit(known: Known) -> Iterator[Problem]:
    for where, value in (
        ("policy.max_total_sequence_length", known.cfg.policy.max_total_sequence_length),
        ("data.max_input_seq_length", known.cfg.data.max_input_seq_length),
    ):
        if value < SHORTEST_LIMIT:
            expected = f"at least {SHORTEST_LIMIT}: BOS, a prompt token and an answer token"
            yield Problem(where, value, expected, "raise it")
            return  # the second is derived from the first


@rule
def _pack_budget(known: Known) -> Iterator[Problem]:
    # A pair is never split. When the data is read, each pair is checked with both answers.
    packing = known.cfg.policy.sequence_packing
    longest = min(known.cfg.data.max_input_seq_length, known.cfg.policy.max_total_sequence_length)
    if packing.enabled and packing.train_mb_tokens < longest:
        where = "policy.sequence_packing.train_mb_tokens"
        expected = f"at least {longest}, as data.max_input_seq_length, and more for a pair's other answer"
        yield Problem(where, packing.train_mb_tokens, expected, "raise it, or lower data.max_input_seq_length")


@rule
def _validation_names(known: Known) -> Iterator[Problem]:
    for name in known.cfg.data.val_data_paths or {}:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            expected = "letters, digits, dot, dash and underscore: the name becomes part of metrics and file names"
            yield Problem("data.val_data_paths", name, expected, "rename this validation set")
        if name == HOLDOUT and known.cfg.data.holdout is not None:
            expected = "another name: that is the validation set of data.holdout"
            yield Problem("data.val_data_paths", name, expected, "rename this validation set")


@rule
def _metric(known: Known) -> Iterator[Problem]:
    checkpointing = known.cfg.checkpointing
    if not checkpointing.enabled or checkpointing.metric_name is None:
        return
    try:
        metric = parse_metric_name(checkpointing.metric_name, known.cfg.data.val_names)
    except ConfigError as error:
        yield from error.problems
        return
    if metric.prefix != "train" and known.cfg.dpo.val_period == 0:
        fix = "set dpo.val_period to checkpointing.save_period, or checkpointing.metric_name to train:loss or null"
        expected = "a metric that is measured before a save; dpo.val_period 0 never validates"
        yield Problem("checkpointing.metric_name", checkpointing.metric_name, expected, fix)
    without_rewards = known.cfg.dpo.reference.mode == "none" and known.cfg.dpo.loss.reads_reference
    if without_rewards and METRICS[metric.metric].needs_rewards:
        measured = ", ".join(name for name, one in METRICS.items() if not one.needs_rewards)
        expected = f"a metric that is measured without a reference: {measured}"
        fix = "choose one of these, e.g. validation-<name>_sft_loss"
        yield Problem("checkpointing.metric_name", checkpointing.metric_name, expected, fix)
    higher = METRICS[metric.metric].higher_is_better
    if higher is not None and higher != checkpointing.higher_is_better:
        where, wanted = "checkpointing.higher_is_better", str(higher).lower()
        yield Problem(where, checkpointing.higher_is_better, f"{wanted} for {metric.metric}", f"set it to {wanted}")


@rule
def _gpu_counters(known: Known) -> Iterator[Problem]:
    machine = known.machine
    if not known.cfg.logger.monitor_gpus or machine is None or machine.device != "cuda":
        return
    if (reason := machine.why_missing("pynvml")) is not None:
        fix = "`pip install nvidia-ml-py`, or logger.monitor_gpus: false"
        yield Problem("logger.monitor_gpus", True, f"the Python package nvidia-ml-py ({reason})", fix)


@rule
def _cluster(known: Known) -> Iterator[Problem]:
    for name, other in (("gpus_per_node", "num_nodes"), ("num_nodes", "gpus_per_node")):
        if getattr(known.cfg.cluster, name) is None and getattr(known.cfg.cluster, other) is not None:
            fix = f"set both, or neither: torchrun decides; cluster.{other} is {getattr(known.cfg.cluster, other)}"
            yield Problem(f"cluster.{name}", None, f"a number beside cluster.{other}", fix)


@rule
def _must_save_by(known: Known) -> Iterator[Problem]:
    text, where = known.cfg.checkpointing.checkpoint_must_save_by, "checkpointing.checkpoint_must_save_by"
    if text is None:
        return
    try:
        seconds = parse_duration_s(text)
    except ValueError:
        seconds = 0
    if seconds == 0:
        yield Problem(where, text, "DD:HH:MM:SS, hours below 24, more than 0", 'for example "00:03:45:00"')
    if not known.cfg.checkpointing.enabled:
        fix = "set it to null, or checkpointing.enabled: true"
        yield Problem(where, text, "null with checkpointing.enabled false: a run that stops would begin again", fix)
    elif not known.cfg.checkpointing.save_optimizer:
        fix = "set it to null, or checkpointing.save_optimizer: true"
        expected = "null with checkpointing.save_optimizer false: a run that stops can't go on from its checkpoint"
        yield Problem(where, text, expected, fix)
