"""Floating-point operations of a pack, by arithmetic alone. A multiply and an add count as two."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.plan.packs import Pack


@dataclass(frozen=True)
class Flops:
    """One forward pass over whole tensors (not one rank's slices)."""

    matmul: float
    """Projections and MLP of all layers; of layers with experts, projections and shared experts."""
    experts: float
    router: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.matmul + self.experts + self.router + self.attention + self.head


def projection_weights(arch: Architecture) -> int:
    """Elements of a layer's query-key-value and output matrices."""
    return arch.hidden_size * arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_heads)


def mlp_weights(arch: Architecture) -> int:
    """Elements of what every token goes through after attention: the gated MLP, or the shared expert."""
    channels = arch.ffn_hidden_size if arch.moe is None else arch.moe.shared_ffn_hidden_size or 0
    return 3 * arch.hidden_size * channels


def expert_weights(arch: Architecture) -> int:
    """Elements of one expert."""
    return 0 if arch.moe is None else 3 * arch.hidden_size * arch.moe.ffn_hidden_size


def forward_flops(arch: Architecture, pack: Pack, layers: int, *, head: bool) -> Flops:
    """2 FLOPs a weight and token (of experts, those that the token goes to); 4 x heads x head_dim a (query, key) pair;
    2 x hidden x vocabulary an ANSWER token, since only positions that predict an answer are projected. Norms, rotation
    and softmax are left out, as usual (arXiv:2205.05198, appendix A)."""
    chosen, all_experts = (0, 0) if arch.moe is None else (arch.moe.experts_per_token, arch.moe.num_experts)
    twice = 2.0 * pack.tokens * layers
    return Flops(
        matmul=twice * (projection_weights(arch) + mlp_weights(arch)),
        experts=twice * chosen * expert_weights(arch),
        router=twice * arch.hidden_size * all_experts,
        attention=4.0 * pack.attention * arch.num_heads * arch.head_dim * layers,
        head=2.0 * pack.answer_tokens * arch.hidden_size * arch.vocab_size if head else 0.0,
    )


def step_flops(arch: Architecture, reference: Architecture | None, pack: Pack, *, trainable: float = 1.0) -> float:
    """What a step on these tokens must compute: policy forward, twice that backward, and the reference's forward.

    Recomputed activations don't count: this is the numerator of MFU. trainable: share of the weights that get gradients;
    the others' half of the backward pass is left out.
    """
    once = forward_flops(arch, pack, arch.num_layers, head=True)
    weights = once.total - once.attention
    flops = once.total + 2 * once.attention + (1 + trainable) * weights
    if reference is not None:
        flops += forward_flops(reference, pack, reference.num_layers, head=True).total
    return flops
