"""Checks of float8 against the model's shape."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.architecture import Architecture
from megadpo.config.problems import Problem
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import FP8_TOKENS


def fp8_problems(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    """Every matrix that float8 can't take: its sides, as each tensor-parallel rank holds them, are multiples of 16, or
    of 128 where scales are blockwise."""
    megatron = cfg.policy.megatron_cfg
    if not megatron.fp8_cfg.enabled:
        return
    where = "policy.megatron_cfg.fp8_cfg.enabled"
    if arch.moe is not None:
        expected = f"false for {arch.hf_class}: layers of experts have not been run in float8"
        yield Problem(where, True, expected, "set it to false")
        return
    recipe, tp = megatron.fp8_cfg.fp8_recipe, megatron.tensor_model_parallel_size
    multiple = FP8_TOKENS[recipe]
    sides = {
        "hidden channels": arch.hidden_size,
        "MLP channels": arch.ffn_hidden_size // tp,
        "query channels": arch.num_heads * arch.head_dim // tp,
        "query, key and value channels": (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // tp,
    }
    odd = [f"{count} {what}" for what, count in sides.items() if count % multiple]
    if odd:
        other = ", or fp8_recipe: tensorwise" if recipe == "blockwise" else ""
        expected = f"layers whose sides are multiples of {multiple} for {recipe} float8; a rank's have {', '.join(odd)}"
        yield Problem(where, True, expected, f"set it to false, lower tensor_model_parallel_size{other}")
