"""Floating-point operations of a step, by arithmetic. A multiply-add counts as two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from megadpo.config.architecture import Architecture, DeltaNet, Layer, Mlp
from megadpo.config.check import chunk_layers
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.plan.packs import Pack


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass over whole tensors (not one rank's shards)."""

    projections: float
    mlp: float
    """In layers with experts: the shared expert."""
    experts: float
    router: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.projections + self.mlp + self.experts + self.router + self.attention + self.head


def forward_flops(arch: Architecture, pack: Pack, layers: Sequence[Layer], *, head: bool) -> Flops:
    """Operations of `layers`: 2 for each weight and token (only weights of experts that get the token); 4 x heads x head_dim
    for each (query, key) pair; in a delta net 6 x heads x key_dim x value_dim for each token; 2 x hidden x vocabulary for
    each ANSWER token, because only positions that predict an answer are projected. Norms, rotation and softmax are left
    out, as usual (arXiv:2205.05198, appendix A), and a delta net's convolution and products within its chunks."""
    projections = mlp = experts = router = attention = 0.0
    for layer, count in Counter(layers).items():
        heads, feed_forward = layer.attention, layer.feed_forward
        per_weight = 2.0 * pack.tokens * arch.hidden_size * count
        projections += 2.0 * pack.tokens * heads.weights(arch.hidden_size) * count
        if isinstance(heads, DeltaNet):
            attention += 2.0 * pack.tokens * heads.state_products * count
        else:
            per_key = heads.num_heads * (heads.head_dim + heads.value_dim)
            attention += 2.0 * pack.query_keys(heads.window) * per_key * count
        if isinstance(feed_forward, Mlp):
            mlp += per_weight * 3 * feed_forward.ffn_size
            continue
        if feed_forward.shared_ffn_size:
            mlp += per_weight * (3 * feed_forward.shared_ffn_size + 1)  # with its gate
        experts += per_weight * feed_forward.per_token * 3 * feed_forward.mlp.ffn_size
        router += per_weight * feed_forward.number
    last = 2.0 * pack.answer_tokens * arch.hidden_size * arch.vocab_size if head else 0.0
    return Flops(projections, mlp, experts, router, attention, last)


@dataclass(frozen=True)
class StageFlops:
    """Operations of one pipeline stage, for all its ranks that share a micro-batch."""

    needed: float
    """Policy's forward, twice that backward (with LoRA once, but for attention), and the reference's forward: the numerator
    of MFU."""
    repeated: float
    """Added by recomputation of activations."""


def stage_flops(cfg: Config, arch: Architecture, reference: Architecture | None, pack: Pack) -> list[StageFlops]:
    """Of each pipeline stage, for training on `pack` with nothing frozen by `policy.freeze`. The layout was checked."""
    stages = chunk_layers(cfg, arch)
    of_reference = [[]] * len(stages) if reference is None else chunk_layers(cfg, reference)
    known: dict[tuple[object, ...], StageFlops] = {}
    found = []
    for number, (chunks, reference_chunks) in enumerate(zip(stages, of_reference, strict=True)):
        last = number == len(stages) - 1
        kind = (*chunks, *reference_chunks, last)
        if kind not in known:
            forward = forward_flops(arch, pack, [*chain(*chunks)], head=last)
            needed = 3 * forward.total
            if cfg.policy.megatron_cfg.peft.enabled:
                # frozen weights have no gradient of their own; adapters are left out
                needed -= forward.total - forward.attention
            if reference is not None:
                needed += forward_flops(reference, pack, [*chain(*reference_chunks)], head=last).total
            known[kind] = StageFlops(needed, _repeated(cfg.policy.megatron_cfg, arch, pack, chunks))
        found.append(known[kind])
    return found


def _repeated(megatron: MegatronConfig, arch: Architecture, pack: Pack, chunks: Iterable[tuple[Layer, ...]]) -> float:
    """The fused head's repeated product is left out, because every layout has it (model/heads/triton)."""
    if not megatron.activation_checkpointing:
        return 0.0
    full, block = megatron.recompute_granularity == "full", megatron.recompute_method == "block"
    if full and block:
        chunks = (layers[: megatron.recompute_num_layers] for layers in chunks)
    flops = forward_flops(arch, pack, [*chain(*chunks)], head=False)
    if full:
        return flops.total
    modules = set(megatron.recompute_modules)
    repeated = flops.attention if "core_attn" in modules else 0.0
    if modules & {"mlp", "moe", "shared_experts"}:  # of a layer with experts `mlp` is the shared one
        repeated += flops.mlp
    return repeated + (flops.experts + flops.router if "moe" in modules else 0.0)
