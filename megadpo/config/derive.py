"""Fills in values that a file leaves out, or sets to null, from other values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from megadpo.config.schema_megatron import FP8_TOKENS, Fp8Config
from megadpo.config.tree import drop, get, put

Tree: TypeAlias = dict[str, Any]

_MEG = "policy.megatron_cfg"


def derive(tree: Tree) -> set[str]:
    """Fills `tree` in place and returns the filled paths. A value whose source is missing stays out: the reader reports
    the source."""
    for path in _NULL_IS_DEFAULT:
        if get(tree, path) is None:
            drop(tree, path)
    filled: set[str] = set()
    for path, value_of in _DERIVED.items():
        if get(tree, path) is not None:
            continue
        drop(tree, path)
        value = value_of(tree)
        if value is not None:
            put(tree, path, value)
            filled.add(path)
    return filled


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _copy_of(path: str) -> Callable[[Tree], Any]:
    return lambda tree: get(tree, path)


def _longest_pair(tree: Tree) -> int | None:
    longest = _whole(get(tree, "policy.max_total_sequence_length", 1024))
    return None if longest is None else 2 * longest


def _pad_multiple(tree: Tree) -> int:
    tp = _whole(get(tree, f"{_MEG}.tensor_model_parallel_size", 1)) or 1
    cp = _whole(get(tree, f"{_MEG}.context_parallel_size", 1)) or 1
    shards = cp * tp if get(tree, f"{_MEG}.sequence_parallel") is True else cp
    return shards * _fp8_tokens(tree)


def _fp8_tokens(tree: Tree) -> int:
    """The tokens of a rank must be a multiple of this."""
    if get(tree, f"{_MEG}.fp8_cfg.enabled") is not True:
        return 1
    return FP8_TOKENS.get(get(tree, f"{_MEG}.fp8_cfg.fp8_recipe", Fp8Config.fp8_recipe), 1)


def _bf16(tree: Tree) -> bool:
    return bool(get(tree, "policy.precision", "bfloat16") == "bfloat16")


def _reference_mode(tree: Tree) -> str | None:
    """With LoRA the default is adapter_off, because it needs no memory."""
    if get(tree, f"{_MEG}.peft.enabled") is not True or get(tree, "dpo.reference.model_name") is not None:
        return None
    return "adapter_off"


# In this order: a later line may use what an earlier one filled in.
_DERIVED: dict[str, Callable[[Tree], Any]] = {
    "dpo.sft_average_log_probs": _copy_of("dpo.preference_average_log_probs"),
    "dpo.reference.mode": _reference_mode,
    "policy.tokenizer.name": _copy_of("policy.model_name"),
    "policy.sequence_packing.train_mb_tokens": _longest_pair,
    "policy.make_sequence_length_divisible_by": _pad_multiple,
    "data.max_input_seq_length": _copy_of("policy.max_total_sequence_length"),
    f"{_MEG}.pipeline_dtype": _copy_of("policy.precision"),
    f"{_MEG}.optimizer.bf16": _bf16,
    f"{_MEG}.optimizer.clip_grad": _copy_of("policy.max_grad_norm"),
    f"{_MEG}.scheduler.start_weight_decay": _copy_of(f"{_MEG}.optimizer.weight_decay"),
    f"{_MEG}.scheduler.end_weight_decay": _copy_of(f"{_MEG}.optimizer.weight_decay"),
}

# null means the default, as in NeMo RL's files.
_NULL_IS_DEFAULT = (
    "policy.logprob_chunk_size",
    "policy.freeze",
    f"{_MEG}.transformer_impl",
    f"{_MEG}.fp8_cfg",
    f"{_MEG}.peft",
    f"{_MEG}.virtual_pipeline_model_parallel_size",
    f"{_MEG}.recompute_granularity",
    f"{_MEG}.recompute_modules",
    f"{_MEG}.recompute_method",
    f"{_MEG}.recompute_num_layers",
)
