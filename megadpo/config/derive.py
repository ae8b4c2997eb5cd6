"""Values that follow from other values where a file leaves them out or says null."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megadpo.config.problems import Problem
from megadpo.config.schema_megatron import FP8_TOKENS, Fp8Config

_MEG = "policy.megatron_cfg"
_ABSENT = object()


def derive(tree: dict[str, Any], problems: list[Problem]) -> set[str]:
    """Fill `tree` in place and return the paths filled. A missing source is skipped: the reader reports it."""
    filled: set[str] = set()
    _head_chunk(tree, problems)
    if get(tree, "dpo.val_batches") == -1:
        put(tree, "dpo.val_batches", 0)
    if get(tree, "policy.max_grad_norm", 0) is None:
        put(tree, "policy.max_grad_norm", 0.0)
    for path, value_of in _DERIVED.items():
        if get(tree, path, None) is not None:
            continue
        drop(tree, path)
        value = value_of(tree)
        if value is not None:
            put(tree, path, value)
            filled.add(path)
    return filled


def get(tree: dict[str, Any], path: str, default: object = None) -> Any:
    """The value at a dotted path, or `default` where any part of it is absent."""
    node: Any = tree
    for name in path.split("."):
        if not isinstance(node, dict) or name not in node:
            return default
        node = node[name]
    return node


def put(tree: dict[str, Any], path: str, value: object) -> None:
    """Set a dotted path, making sections; does nothing where a section is something else."""
    *above, last = path.split(".")
    node = tree
    for name in above:
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            return
        node = inner
    node[last] = value


def drop(tree: dict[str, Any], path: str) -> None:
    """Remove a dotted path where it is there."""
    *above, last = path.split(".")
    node = get(tree, ".".join(above)) if above else tree
    if isinstance(node, dict):
        node.pop(last, None)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _copy_of(path: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tree: get(tree, path)


def _longest_pair(tree: dict[str, Any]) -> int | None:
    longest = _whole(get(tree, "policy.max_total_sequence_length", 1024))
    return None if longest is None else 2 * longest


def _pad_multiple(tree: dict[str, Any]) -> int:
    tp = _whole(get(tree, f"{_MEG}.tensor_model_parallel_size", 1)) or 1
    cp = _whole(get(tree, f"{_MEG}.context_parallel_size", 1)) or 1
    shards = cp * tp if get(tree, f"{_MEG}.sequence_parallel") is True else cp
    return shards * _fp8_tokens(tree)


def _fp8_tokens(tree: dict[str, Any]) -> int:
    """Tokens of a rank are a multiple of this."""
    if get(tree, f"{_MEG}.fp8_cfg.enabled") is not True:
        return 1
    return FP8_TOKENS.get(get(tree, f"{_MEG}.fp8_cfg.fp8_recipe", Fp8Config.fp8_recipe), 1)


def _bf16(tree: dict[str, Any]) -> bool:
    return bool(get(tree, "policy.precision", "bfloat16") == "bfloat16")


# In this order: a later line may use what an earlier one filled in.
_DERIVED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dpo.sft_average_log_probs": _copy_of("dpo.preference_average_log_probs"),
    "policy.tokenizer.name": _copy_of("policy.model_name"),
    "policy.sequence_packing.train_mb_tokens": _longest_pair,
    "policy.make_sequence_length_divisible_by": _pad_multiple,
    "policy.logprob_chunk_size": lambda tree: None,
    "policy.freeze": lambda tree: None,
    "data.max_input_seq_length": _copy_of("policy.max_total_sequence_length"),
    f"{_MEG}.transformer_impl": lambda tree: None,
    f"{_MEG}.fp8_cfg": lambda tree: None,
    f"{_MEG}.pipeline_dtype": _copy_of("policy.precision"),
    f"{_MEG}.virtual_pipeline_model_parallel_size": lambda tree: None,
    f"{_MEG}.recompute_granularity": lambda tree: None,
    f"{_MEG}.recompute_modules": lambda tree: None,
    f"{_MEG}.recompute_method": lambda tree: None,
    f"{_MEG}.recompute_num_layers": lambda tree: None,
    f"{_MEG}.moe_router_load_balancing_type": lambda tree: None,
    f"{_MEG}.moe_token_dispatcher_type": lambda tree: None,
    f"{_MEG}.optimizer.bf16": _bf16,
    f"{_MEG}.optimizer.clip_grad": _copy_of("policy.max_grad_norm"),
    f"{_MEG}.scheduler.start_weight_decay": _copy_of(f"{_MEG}.optimizer.weight_decay"),
    f"{_MEG}.scheduler.end_weight_decay": _copy_of(f"{_MEG}.optimizer.weight_decay"),
}


def _head_chunk(tree: dict[str, Any], problems: list[Problem]) -> None:
    """NeMo RL names the chunk of the head three ways; all of them become policy.logprob_chunk_size."""
    target = "policy.logprob_chunk_size"
    for name in ("fused_linear_logprobs_chunk_size", "linear_ce_fusion_chunk_size"):
        path = f"{_MEG}.{name}"
        value = get(tree, path, _ABSENT)
        drop(tree, path)
        if value is _ABSENT or value is None:
            continue
        if get(tree, target) is None:
            put(tree, target, value)
        elif get(tree, target) != value:
            problems.append(Problem(path, value, f"{get(tree, target)}, as {target}", f"keep {target} only"))
