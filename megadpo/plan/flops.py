"""Floating-point operations of a step, by arithmetic alone. A multiply and an add count as two."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.check import layers_per_stage
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.plan.packs import Pack


@dataclass(frozen=True)
class Flops:
    """One forward pass over whole tensors (not one rank's slices)."""

    projections: float
    mlp: float
    """Of layers with experts: the shared expert."""
    experts: float
    router: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.projections + self.mlp + self.experts + self.router + self.attention + self.head


def forward_flops(arch: Architecture, pack: Pack, layers: int, *, head: bool) -> Flops:
    """2 FLOPs a weight and token (of experts, those that the token goes to); 4 x heads x head_dim a (query, key) pair;
    2 x hidden x vocabulary an ANSWER token, since only positions that predict an answer are projected. Norms, rotation
    and softmax are left out, as usual (arXiv:2205.05198, appendix A)."""
    moe, hidden = arch.moe, arch.hidden_size
    mlp = 3 * hidden * (arch.ffn_hidden_size if moe is None else moe.shared_ffn_hidden_size or 0)
    if moe is not None and moe.shared_ffn_hidden_size:
        mlp += hidden  # the shared expert's gate
    per_weight = 2.0 * pack.tokens * layers
    return Flops(
        projections=per_weight * hidden * arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_heads),
        mlp=per_weight * mlp,
        experts=0.0 if moe is None else per_weight * moe.experts_per_token * 3 * hidden * moe.ffn_hidden_size,
        router=0.0 if moe is None else per_weight * hidden * moe.num_experts,
        attention=4.0 * pack.query_keys * arch.num_heads * arch.head_dim * layers,
        head=2.0 * pack.answer_tokens * hidden * arch.vocab_size if head else 0.0,
    )


@dataclass(frozen=True)
class StageFlops:
    """Of one pipeline stage, over all of its ranks that share a micro-batch."""

    needed: float
    """Policy's forward, twice that backward, and the reference's forward: the numerator of MFU."""
    repeated: float
    """What recomputation of activations adds."""


def stage_flops(cfg: Config, arch: Architecture, reference: Architecture | None, pack: Pack) -> list[StageFlops]:
    """Of each pipeline stage, for training on `pack` with nothing frozen. The layout was checked."""
    megatron = cfg.policy.megatron_cfg
    layers = layers_per_stage(cfg, arch.num_layers) or []
    of_reference = [0] * len(layers) if reference is None else layers_per_stage(cfg, reference.num_layers) or []
    known: dict[tuple[int, int, bool], StageFlops] = {}
    stages = []
    for stage, (count, reference_count) in enumerate(zip(layers, of_reference, strict=True)):
        kind = (count, reference_count, stage == len(layers) - 1)
        if kind not in known:
            forward = forward_flops(arch, pack, count, head=kind[2])
            needed = 3 * forward.total
            if reference is not None:
                needed += forward_flops(reference, pack, reference_count, head=kind[2]).total
            known[kind] = StageFlops(needed, _repeated(megatron, arch, pack, count))
        stages.append(known[kind])
    return stages


def _repeated(megatron: MegatronConfig, arch: Architecture, pack: Pack, layers: int) -> float:
    """The fused head's second product is left out: every layout has it (model/heads/triton)."""
    if not megatron.activation_checkpointing:
        return 0.0
    if megatron.recompute_granularity == "full":
        if megatron.recompute_method == "block":
            layers = min(layers, megatron.recompute_num_layers * megatron.virtual_pipeline_model_parallel_size)
        return forward_flops(arch, pack, layers, head=False).total
    modules, flops = set(megatron.recompute_modules), forward_flops(arch, pack, layers, head=False)
    repeated = flops.attention if "core_attn" in modules else 0.0
    if modules & {"mlp", "moe", "shared_experts"}:  # of a layer with experts `mlp` is the shared one
        repeated += flops.mlp
    return repeated + (flops.experts + flops.router if "moe" in modules else 0.0)
