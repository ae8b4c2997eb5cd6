"""Floating-point operations of a pack, by arithmetic alone. A multiply and an add count as two."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.plan.packs import Pack


@dataclass(frozen=True)
class Flops:
    """One forward pass over whole tensors (not one rank's slices)."""

    matmul: float
    """Projections and MLP of all layers."""
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.matmul + self.attention + self.head


def matmul_weights_per_layer(arch: Architecture) -> int:
    """Elements of a layer's matrices: query-key-value, output, and the gated MLP's three."""
    heads = arch.num_heads * arch.head_dim
    keys_and_values = 2 * arch.num_kv_heads * arch.head_dim
    return arch.hidden_size * (2 * heads + keys_and_values + 3 * arch.ffn_hidden_size)


def forward_flops(arch: Architecture, pack: Pack, layers: int, *, head: bool) -> Flops:
    """2 FLOPs a weight and token; 4 x heads x head_dim a (query, key) pair; 2 x hidden x vocabulary an ANSWER token,
    since only positions that predict an answer are projected. Norms, rotation and softmax are left out, as usual
    (arXiv:2205.05198, appendix A)."""
    return Flops(
        matmul=2.0 * pack.tokens * matmul_weights_per_layer(arch) * layers,
        attention=4.0 * pack.attention * arch.num_heads * arch.head_dim * layers,
        head=2.0 * pack.answer_tokens * arch.hidden_size * arch.vocab_size if head else 0.0,
    )


def step_flops(arch: Architecture, reference: Architecture | None, pack: Pack) -> float:
    """What a step on these tokens must compute: policy forward, twice that backward, and the reference's forward.
    Recomputed activations don't count: this is the numerator of MFU."""
    flops = 3 * forward_flops(arch, pack, arch.num_layers, head=True).total
    if reference is not None:
        flops += forward_flops(reference, pack, reference.num_layers, head=True).total
    return flops
