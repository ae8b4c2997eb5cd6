"""Activations of a stage by arithmetic, for the search over layouts; the plan itself counts them (trace.py)."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.plan.packs import Lengths, shares_prompt


@dataclass(frozen=True)
class FullPack:
    """The pack that memory is counted for."""

    tokens: int
    answer_tokens: int
    key_tokens: int
    """Keys of all segments: a shared prompt's count once for itself and once for each answer."""

    @classmethod
    def of(cls, cfg: Config, lengths: Lengths) -> FullPack:
        prompt, chosen, rejected = (int(total) for total in lengths.sum(axis=0))
        prompts = 1 if shares_prompt(cfg) else 2
        tokens = prompts * prompt + chosen + rejected
        return cls(tokens, chosen + rejected, tokens + (2 * prompt if prompts == 1 else 0))


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, as in trace.StageTrace."""

    buffers: int
    saved: int
    peak: int
    """The higher of forward's and backward's."""


def estimate(cfg: Config, arch: Architecture, pack: FullPack, *, layers: int, last: bool) -> Activations:
    """Saved bytes as torch keeps them on a GPU with varlen attention; the peak is within some per cent."""
    megatron, width = cfg.policy.megatron_cfg, 2 if cfg.policy.precision == "bfloat16" else 4
    tp, hidden = megatron.tensor_model_parallel_size, arch.hidden_size
    stream = pack.tokens * hidden * width // (tp if megatron.sequence_parallel else 1)
    layer = _layer(cfg, arch, pack, stream, width)
    kept, repeated = layer, 0
    if megatron.activation_checkpointing:
        if megatron.recompute_granularity == "full":
            kept, repeated = stream, layer
        else:
            kept = layer - _recomputed(cfg, arch, pack, stream, width)
            repeated = layer - kept
    saved = layers * kept + stream + pack.tokens * arch.head_dim * width
    if repeated and megatron.recompute_granularity == "full" and megatron.recompute_method == "block":
        saved += max(0, layers - megatron.recompute_num_layers) * (layer - stream)
    if repeated and megatron.recompute_granularity == "full" and megatron.recompute_method == "uniform":
        saved -= (layers - -(-layers // megatron.recompute_num_layers)) * stream
        repeated *= megatron.recompute_num_layers
    ffn = pack.tokens * arch.ffn_hidden_size * width // tp
    transient = repeated + 4 * ffn + stream
    if last:
        answers = pack.answer_tokens * hidden * width
        saved += answers
        rows = min(cfg.policy.logprob_chunk_size, pack.answer_tokens)
        vocabulary = arch.vocab_size // tp
        transient = max(transient, answers + vocabulary * hidden * (4 + width) + rows * vocabulary * (4 + width))
    buffers = pack.tokens * hidden * width if megatron.sequence_parallel else 0
    return Activations(buffers, saved, saved + transient)


def _layer(cfg: Config, arch: Architecture, pack: FullPack, stream: int, width: int) -> int:
    """Two norms' inputs and outputs; rotated queries, keys, values, output of attention; both sides of SwiGLU."""
    tp, tokens = cfg.policy.megatron_cfg.tensor_model_parallel_size, pack.tokens
    heads = arch.num_heads * arch.head_dim
    attention = (2 * tokens + 2 * pack.key_tokens) * heads * width + 4 * tokens * arch.num_heads
    norms = 4 * stream + 8 * stream // (arch.hidden_size * width)
    if arch.qk_norm:
        norms += tokens * (arch.num_heads + arch.num_kv_heads) * (arch.head_dim * width + 4) // tp
    return norms + (attention + 3 * tokens * arch.ffn_hidden_size * width) // tp


def _recomputed(cfg: Config, arch: Architecture, pack: FullPack, stream: int, width: int) -> int:
    """What of a layer selective recomputation does not keep; its modules' inputs are kept in its place."""
    megatron, tokens = cfg.policy.megatron_cfg, pack.tokens
    tp, freed = megatron.tensor_model_parallel_size, 0
    if "core_attn" in megatron.recompute_modules:
        keys = 2 * (pack.key_tokens * arch.num_heads - tokens * arch.num_kv_heads) * arch.head_dim * width
        freed += (keys + 4 * tokens * arch.num_heads) // tp
    if "layernorm" in megatron.recompute_modules:
        freed += 2 * stream
    if "mlp" in megatron.recompute_modules:
        freed += 3 * tokens * arch.ffn_hidden_size * width // tp
    return freed
