"""What must hold between the fields that choose whose layers, optimizer and number format a GPU runs."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.problems import Problem
from megadpo.config.rules import rule
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import FP8_TOKENS
from megadpo.config.schema_policy import PolicyConfig

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_IMPL = f"{_MEG}.transformer_impl"
_RECOMPUTE = (f"{_MEG}.activation_checkpointing", f"{_MEG}.recompute_granularity", f"{_MEG}.recompute_modules")


def why_not_transformer_engine(policy: PolicyConfig) -> str | None:
    """What of `policy` Transformer Engine's layers can't do, whatever the machine; None where they can do all of it."""
    precision, megatron = policy.precision, policy.megatron_cfg
    if precision != "bfloat16":
        return f"policy.precision {precision}: its matrix products of float32 run in TF32"
    selective = megatron.activation_checkpointing and megatron.recompute_granularity == "selective"
    if selective and "layernorm" in megatron.recompute_modules:
        return f"{_MEG}.recompute_modules with layernorm: its norms are part of the linear layers that follow"
    return None


@rule
def _transformer_engine(cfg: Config) -> Iterator[Problem]:
    if cfg.policy.megatron_cfg.transformer_impl != "transformer_engine":
        return
    if cfg.policy.device == "cpu":
        expected = "local or auto on policy.device cpu: Transformer Engine's kernels are CUDA's"
        yield Problem(_IMPL, "transformer_engine", expected, "set it to auto")
    reason = why_not_transformer_engine(cfg.policy)
    if reason is not None:
        yield Problem(
            _IMPL, "transformer_engine", f"local or auto with {reason}", "set it to auto, or change the other"
        )


@rule
def _fp8(cfg: Config) -> Iterator[Problem]:
    if not cfg.policy.megatron_cfg.fp8_cfg.enabled:
        return
    where = f"{_MEG}.fp8_cfg.enabled"
    if cfg.policy.megatron_cfg.transformer_impl == "local":
        fix = f"set it to false, or {_IMPL}: auto"
        yield Problem(where, True, f"false with {_IMPL} local: float8 is Transformer Engine's", fix)
    if cfg.policy.device == "cpu":
        yield Problem(where, True, "false on policy.device cpu: float8 products are CUDA's", "set it to false")
    reason = why_not_transformer_engine(cfg.policy)
    if reason is not None:
        expected = f"false where Transformer Engine's layers can't be used, here with {reason}"
        yield Problem(where, True, expected, "set it to false, or change the other")


@rule
def _fp8_padding(cfg: Config) -> Iterator[Problem]:
    megatron, multiple = cfg.policy.megatron_cfg, cfg.policy.make_sequence_length_divisible_by
    if not megatron.fp8_cfg.enabled:
        return
    shards = megatron.context_parallel_size * (megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1)
    needed = shards * FP8_TOKENS[megatron.fp8_cfg.fp8_recipe]
    if multiple % needed:
        where = "policy.make_sequence_length_divisible_by"
        each = f"{FP8_TOKENS[megatron.fp8_cfg.fp8_recipe]} tokens on each of {shards} ranks"
        expected = f"a multiple of {needed}: {megatron.fp8_cfg.fp8_recipe} float8 wants multiples of {each}"
        yield Problem(where, multiple, expected, f"remove it, or set it to {needed}")


@rule
def _gradient_accumulation_fusion(cfg: Config) -> Iterator[Problem]:
    if cfg.policy.megatron_cfg.gradient_accumulation_fusion and cfg.policy.device == "cpu":
        where = f"{_MEG}.gradient_accumulation_fusion"
        yield Problem(where, True, "false or null on policy.device cpu: its kernels are CUDA's", "set it to null")


@rule
def _adam(cfg: Config) -> Iterator[Problem]:
    optimizer, where = cfg.policy.megatron_cfg.optimizer, f"{_OPT}.adam_impl"
    if optimizer.adam_impl == "auto":
        return
    if optimizer.optimizer != "adam":
        yield Problem(where, optimizer.adam_impl, f"auto with {_OPT}.optimizer {optimizer.optimizer}", "set it to auto")
    if optimizer.adam_impl == "transformer_engine" and cfg.policy.device == "cpu":
        yield Problem(where, optimizer.adam_impl, "torch or auto on policy.device cpu", "set it to auto")
    precision_aware = optimizer.use_precision_aware_optimizer and not optimizer.optimizer_cpu_offload
    if optimizer.adam_impl == "torch" and precision_aware:
        fix = f"set it to auto, or {_OPT}.use_precision_aware_optimizer: false"
        expected = "transformer_engine or auto with use_precision_aware_optimizer, which is its FusedAdam"
        yield Problem(where, "torch", expected, fix)
