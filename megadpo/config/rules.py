"""What must hold between fields, whatever the model and the number of processes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

from megadpo.config.metric import METRICS, parse_duration_s, parse_metric_name
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_SCHED = f"{_MEG}.scheduler"
_DDP = f"{_MEG}.distributed_data_parallel_config"

Rule = Callable[[Config], Iterator[Problem]]
_RULES: list[tuple[frozenset[str], Rule]] = []


def rule(*fields: str) -> Callable[[Rule], Rule]:
    """Register a rule; it is skipped where one of `fields` could not be read."""

    def register(holds: Rule) -> Rule:
        _RULES.append((frozenset(fields), holds))
        return holds

    return register


def broken_rules(cfg: Config, bad: frozenset[str] = frozenset()) -> list[Problem]:
    """Every rule that `cfg` breaks. `bad`: paths that hold a stand-in and must not be judged."""
    judged = [holds for fields, holds in _RULES if not any(covered(field, bad) for field in fields)]
    return [problem for holds in judged for problem in holds(cfg)]


def covered(path: str, bad: frozenset[str]) -> bool:
    """True when `path`, a section above it, or something inside it is in `bad`."""
    return any(path == one or path.startswith(one + ".") or one.startswith(path + ".") for one in bad)


def _must_equal(where: str, value: object, wanted: object, source: str) -> Iterator[Problem]:
    if value != wanted:
        yield Problem(where, value, f"{wanted!r}, as {source}", f"remove {where}: it follows {source}")


@rule(f"{_OPT}.bf16", "policy.precision")
def _bf16(cfg: Config) -> Iterator[Problem]:
    bf16 = cfg.policy.precision == "bfloat16"
    yield from _must_equal(f"{_OPT}.bf16", cfg.policy.megatron_cfg.optimizer.bf16, bf16, "policy.precision")


@rule(f"{_MEG}.pipeline_dtype", "policy.precision")
def _pipeline_dtype(cfg: Config) -> Iterator[Problem]:
    where = f"{_MEG}.pipeline_dtype"
    yield from _must_equal(where, cfg.policy.megatron_cfg.pipeline_dtype, cfg.policy.precision, "policy.precision")


@rule(f"{_OPT}.clip_grad", "policy.max_grad_norm")
def _clip_grad(cfg: Config) -> Iterator[Problem]:
    clip = cfg.policy.megatron_cfg.optimizer.clip_grad
    yield from _must_equal(f"{_OPT}.clip_grad", clip, cfg.policy.max_grad_norm, "policy.max_grad_norm")


@rule("dpo.preference_loss_weight", "dpo.sft_loss_weight")
def _some_loss(cfg: Config) -> Iterator[Problem]:
    if cfg.dpo.preference_loss_weight == 0 and cfg.dpo.sft_loss_weight == 0:
        fix = "set dpo.preference_loss_weight: 1, or dpo.sft_loss_weight: 1 for SFT"
        yield Problem("dpo.preference_loss_weight", 0.0, "a positive loss weight, this one or sft_loss_weight", fix)


@rule("dpo.reference.mode", "dpo.preference_loss_weight", "dpo.reference.model_name")
def _reference(cfg: Config) -> Iterator[Problem]:
    reference = cfg.dpo.reference
    if reference.mode != "none":
        return
    if cfg.dpo.preference_loss_weight != 0:
        fix = "set dpo.reference.mode: resident, or dpo.preference_loss_weight: 0"
        yield Problem("dpo.reference.mode", "none", "resident, since the preference loss needs a reference", fix)
    if reference.model_name is not None:
        fix = "set dpo.reference.mode: resident, or remove the name"
        yield Problem("dpo.reference.model_name", reference.model_name, "null with dpo.reference.mode none", fix)


@rule(
    f"{_MEG}.sequence_parallel",
    f"{_MEG}.tensor_model_parallel_size",
    f"{_MEG}.context_parallel_size",
    "policy.make_sequence_length_divisible_by",
)
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


@rule(
    f"{_MEG}.context_parallel_size",
    f"{_MEG}.tensor_model_parallel_size",
    f"{_MEG}.sequence_parallel",
    "policy.make_sequence_length_divisible_by",
    "policy.sequence_packing.train_mb_tokens",
)
def _smallest_pack(cfg: Config) -> Iterator[Problem]:
    packing, multiple = cfg.policy.sequence_packing, cfg.policy.make_sequence_length_divisible_by
    if packing.enabled and packing.train_mb_tokens < multiple:
        where = "policy.sequence_packing.train_mb_tokens"
        expected = f"at least {multiple}, policy.make_sequence_length_divisible_by, to which packs are padded"
        yield Problem(where, packing.train_mb_tokens, expected, f"raise it to {multiple} or more")


@rule(
    f"{_MEG}.pipeline_model_parallel_size",
    f"{_MEG}.num_layers_in_first_pipeline_stage",
    f"{_MEG}.num_layers_in_last_pipeline_stage",
    f"{_MEG}.virtual_pipeline_model_parallel_size",
)
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


@rule(
    f"{_MEG}.activation_checkpointing",
    f"{_MEG}.recompute_granularity",
    f"{_MEG}.recompute_method",
    f"{_MEG}.recompute_num_layers",
    f"{_MEG}.recompute_modules",
)
def _recomputation(cfg: Config) -> Iterator[Problem]:
    """What the granularity gives no effect; megatron-core refuses the numbers too (transformer_config.py:1180)."""
    megatron, usual = cfg.policy.megatron_cfg, MegatronConfig()
    if not megatron.activation_checkpointing:
        return
    unused = {"selective": ("recompute_method", "recompute_num_layers"), "full": ("recompute_modules",)}
    for name in unused[megatron.recompute_granularity]:
        value, default = getattr(megatron, name), getattr(usual, name)
        if value != default:
            other = "full" if megatron.recompute_granularity == "selective" else "selective"
            expected = (
                f"{default!r}, the default: recompute_granularity {megatron.recompute_granularity} has no use for it"
            )
            yield Problem(f"{_MEG}.{name}", value, expected, f"remove it, or set {_MEG}.recompute_granularity: {other}")


@rule(f"{_MEG}.freeze_moe_router", f"{_MEG}.moe_router_load_balancing_type", f"{_MEG}.moe_per_layer_logging")
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


@rule(f"{_DDP}.overlap_grad_reduce", f"{_DDP}.overlap_param_gather", f"{_OPT}.use_distributed_optimizer")
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


@rule(
    f"{_OPT}.use_precision_aware_optimizer",
    f"{_OPT}.optimizer",
    f"{_OPT}.use_distributed_optimizer",
    "policy.device",
    "checkpointing.enabled",
    "checkpointing.save_optimizer",
)
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


@rule(f"{_OPT}.optimizer", f"{_OPT}.use_distributed_optimizer", f"{_OPT}.use_precision_aware_optimizer")
def _distributed_optimizer(cfg: Config) -> Iterator[Problem]:
    optimizer, where = cfg.policy.megatron_cfg.optimizer, f"{_OPT}.use_distributed_optimizer"
    if (
        optimizer.use_precision_aware_optimizer or not optimizer.use_distributed_optimizer
    ):  # the former has its own rule
        return
    if optimizer.optimizer != "adam":
        expected = f"false with {_OPT}.optimizer {optimizer.optimizer}: megatron-core shards Adam's state only"
        yield Problem(where, True, expected, f"set it to false, or {_OPT}.optimizer: adam")


@rule(
    f"{_OPT}.use_precision_aware_optimizer",
    f"{_OPT}.exp_avg_dtype",
    f"{_OPT}.exp_avg_sq_dtype",
    f"{_OPT}.optimizer_cpu_offload",
    f"{_OPT}.optimizer_offload_fraction",
    f"{_OPT}.overlap_cpu_optimizer_d2h_h2d",
)
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


@rule(f"{_OPT}.lr", f"{_OPT}.min_lr", f"{_SCHED}.lr_warmup_init")
def _rates(cfg: Config) -> Iterator[Problem]:
    optimizer, schedule = cfg.policy.megatron_cfg.optimizer, cfg.policy.megatron_cfg.scheduler
    for where, value in ((f"{_OPT}.min_lr", optimizer.min_lr), (f"{_SCHED}.lr_warmup_init", schedule.lr_warmup_init)):
        if value > optimizer.lr:
            yield Problem(where, value, f"at most {_OPT}.lr ({optimizer.lr:g})", f"lower it, or raise {_OPT}.lr")


@rule(f"{_SCHED}.lr_decay_style", f"{_SCHED}.lr_decay_iters", f"{_SCHED}.lr_warmup_iters", "dpo.max_num_steps")
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


@rule(
    f"{_OPT}.weight_decay",
    f"{_SCHED}.start_weight_decay",
    f"{_SCHED}.end_weight_decay",
    f"{_SCHED}.weight_decay_incr_style",
)
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


@rule("data.max_input_seq_length", "policy.max_total_sequence_length")
def _input_length(cfg: Config) -> Iterator[Problem]:
    length, longest = cfg.data.max_input_seq_length, cfg.policy.max_total_sequence_length
    if length > longest:
        expected = f"at most policy.max_total_sequence_length ({longest})"
        yield Problem("data.max_input_seq_length", length, expected, "remove it, or raise the other")


@rule(
    "policy.sequence_packing.train_mb_tokens",
    "policy.sequence_packing.enabled",
    "policy.max_total_sequence_length",
    "data.max_input_seq_length",
)
def _pack_budget(cfg: Config) -> Iterator[Problem]:
    # A pair is never split. Whether each one fits, both answers together, is checked when the data is read.
    packing = cfg.policy.sequence_packing
    longest = min(cfg.data.max_input_seq_length, cfg.policy.max_total_sequence_length)
    if packing.enabled and packing.train_mb_tokens < longest:
        where = "policy.sequence_packing.train_mb_tokens"
        expected = f"at least {longest}, as data.max_input_seq_length, and more for a pair's other answer"
        yield Problem(where, packing.train_mb_tokens, expected, "raise it, or lower data.max_input_seq_length")


@rule("policy.attention_kernel", "policy.device")
def _kernel(cfg: Config) -> Iterator[Problem]:
    kernel = cfg.policy.attention_kernel
    if cfg.policy.device == "cpu" and kernel in ("varlen", "transformer_engine"):
        yield Problem("policy.attention_kernel", kernel, "auto, cpu or sdpa on policy.device cpu", "set it to auto")
    if cfg.policy.device == "cuda" and kernel == "cpu":
        yield Problem("policy.attention_kernel", kernel, "another kernel on policy.device cuda", "set it to auto")


@rule("policy.logprob_kernel", "policy.device")
def _head(cfg: Config) -> Iterator[Problem]:
    kernel = cfg.policy.logprob_kernel
    if cfg.policy.device == "cpu" and kernel == "triton":
        yield Problem("policy.logprob_kernel", kernel, "auto or torch on policy.device cpu", "set it to auto")


@rule("data.prompt_key", "data.chosen_key", "data.rejected_key")
def _columns(cfg: Config) -> Iterator[Problem]:
    keys = (cfg.data.prompt_key, cfg.data.chosen_key, cfg.data.rejected_key)
    if len(set(keys)) < len(keys):
        fix = "name prompt, chosen and rejected apart"
        yield Problem("data.rejected_key", ", ".join(keys), "three different keys", fix)


@rule("data.dataset_name", "data.prompt_key", "data.chosen_key", "data.rejected_key")
def _unread_keys(cfg: Config) -> Iterator[Problem]:
    name = cfg.data.dataset_name
    if name is None or name == "BinaryPreferenceDataset":
        return
    answers_read = name in ("Tulu3Preference", "ImplicitPrompt")
    for key, default in (("prompt_key", "prompt"), ("chosen_key", "chosen"), ("rejected_key", "rejected")):
        value = getattr(cfg.data, key)
        if value != default and not (answers_read and key != "prompt_key"):
            fix = "remove it, or set data.dataset_name: BinaryPreferenceDataset"
            yield Problem(f"data.{key}", value, f"{default}, since {name} has field names of its own", fix)


@rule("data.val_data_paths")
def _validation_names(cfg: Config) -> Iterator[Problem]:
    for name in cfg.data.val_data_paths or {}:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            expected = "letters, digits, dot, dash and underscore: the name becomes part of metrics and file names"
            yield Problem("data.val_data_paths", name, expected, "rename this validation set")


@rule(
    "checkpointing.metric_name",
    "checkpointing.enabled",
    "checkpointing.higher_is_better",
    "data.val_data_paths",
    "dpo.val_period",
)
def _metric(cfg: Config) -> Iterator[Problem]:
    checkpointing = cfg.checkpointing
    if not checkpointing.enabled or checkpointing.metric_name is None:
        return
    try:
        metric = parse_metric_name(checkpointing.metric_name, list(cfg.data.val_data_paths or {}))
    except ConfigError as error:
        yield from error.problems
        return
    if metric.prefix != "train" and cfg.dpo.val_period == 0:
        fix = "set dpo.val_period to checkpointing.save_period, or checkpointing.metric_name to train:loss or null"
        expected = "a metric that is measured before a save; dpo.val_period 0 never validates"
        yield Problem("checkpointing.metric_name", checkpointing.metric_name, expected, fix)
    higher = METRICS[metric.metric]
    if higher is not None and higher != checkpointing.higher_is_better:
        where, wanted = "checkpointing.higher_is_better", str(higher).lower()
        yield Problem(where, checkpointing.higher_is_better, f"{wanted} for {metric.metric}", f"set it to {wanted}")


@rule("cluster.gpus_per_node", "cluster.num_nodes")
def _cluster(cfg: Config) -> Iterator[Problem]:
    for name, other in (("gpus_per_node", "num_nodes"), ("num_nodes", "gpus_per_node")):
        if getattr(cfg.cluster, name) is None and getattr(cfg.cluster, other) is not None:
            fix = f"set both, or neither: torchrun decides; cluster.{other} is {getattr(cfg.cluster, other)}"
            yield Problem(f"cluster.{name}", None, f"a number beside cluster.{other}", fix)


@rule("checkpointing.checkpoint_must_save_by")
def _must_save_by(cfg: Config) -> Iterator[Problem]:
    text = cfg.checkpointing.checkpoint_must_save_by
    if text is None:
        return
    try:
        parse_duration_s(text)
    except ValueError:
        where = "checkpointing.checkpoint_must_save_by"
        yield Problem(where, text, "DD:HH:MM:SS, hours below 24", 'for example "00:03:45:00"')
