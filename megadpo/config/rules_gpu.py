"""What must hold between the fields that choose whose layers, optimizer and number format a GPU runs."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.known import Known, rule
from megadpo.config.problems import Problem
from megadpo.config.schema_megatron import FP8_TOKENS
from megadpo.config.schema_policy import PolicyConfig

_MEG = "policy.megatron_cfg"
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
def _transformer_engine(known: Known) -> Iterator[Problem]:
    if known.cfg.policy.megatron_cfg.transformer_impl != "transformer_engine":
        return
    if known.cfg.policy.device == "cpu":
        expected = "local or auto on policy.device cpu: Transformer Engine's kernels are CUDA's"
        yield Problem(_IMPL, "transformer_engine", expected, "set it to auto")
    reason = why_not_transformer_engine(known.cfg.policy)
    if reason is not None:
        yield Problem(
            _IMPL, "transformer_engine", f"local or auto with {reason}", "set it to auto, or change the other"
        )


@rule
def _fp8(known: Known) -> Iterator[Problem]:
    if not known.cfg.policy.megatron_cfg.fp8_cfg.enabled:
        return
    where = f"{_MEG}.fp8_cfg.enabled"
    if known.cfg.policy.megatron_cfg.transformer_impl == "local":
        fix = f"set it to false, or {_IMPL}: auto"
        yield Problem(where, True, f"false with {_IMPL} local: float8 is Transformer Engine's", fix)
    if known.cfg.policy.device == "cpu":
        yield Problem(where, True, "false on policy.device cpu: float8 products are CUDA's", "set it to false")
    reason = why_not_transformer_engine(known.cfg.policy)
    if reason is not None:
        expected = f"false where Transformer Engine's layers can't be used, here with {reason}"
        yield Problem(where, True, expected, "set it to false, or change the other")


@rule
def _fp8_padding(known: Known) -> Iterator[Problem]:
    megatron, multiple = known.cfg.policy.megatron_cfg, known.cfg.policy.make_sequence_length_divisible_by
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
def _fp8_shapes(known: Known) -> Iterator[Problem]:
    """Every matrix that float8 can't take: its sides, as each tensor-parallel rank holds them, are multiples of 16, or
    of 128 where scales are blockwise."""
    megatron, arch = known.cfg.policy.megatron_cfg, known.arch
    if arch is None or not megatron.fp8_cfg.enabled:
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


@rule
def _gradient_accumulation_fusion(known: Known) -> Iterator[Problem]:
    if known.cfg.policy.megatron_cfg.gradient_accumulation_fusion and known.cfg.policy.device == "cpu":
        where = f"{_MEG}.gradient_accumulation_fusion"
        yield Problem(where, True, "false or null on policy.device cpu: its kernels are CUDA's", "set it to null")
