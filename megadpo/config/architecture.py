"""The neutral description of a model: what common code builds, checks and plans from.

megadpo/families reads it from a Hugging Face folder's config.json; nothing else asks for a family by name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MoeArchitecture:
    """The experts of every layer. A token goes to the `experts_per_token` with the highest router logits."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int
    """Of each expert."""
    normalized_weights: bool
    """True: the chosen experts' weights sum to 1 (softmax over the chosen logits). False: they are their share of the
    softmax over all experts."""
    shared_ffn_hidden_size: int | None
    """Of the shared expert, which every token goes through, times the sigmoid of its own gate; None: there is none."""
    aux_loss_coef: float
    """The model's own router_aux_loss_coef."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder, sizes in elements. A layer is RMSNorm, causal attention with rotary positions, RMSNorm and a gated SiLU
    MLP (or experts of such MLPs); there is a bias or a norm elsewhere only where a field says so."""

    family: str
    """Which of FAMILIES reads its config.json and has its weight table."""
    hf_class: str
    """Class name in config.json, e.g. LlamaForCausalLM."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    """Of a dense layer; a model with experts has its sizes in `moe`."""
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None: plain RoPE. Else `rope_type` linear, llama3 or yarn and every number of its formula (families/rope.py)."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    """Bias of the query, key and value projections."""
    qk_norm: bool
    """RMSNorm on each head of queries and keys, before RoPE."""
    sliding_window: int | None
    """Keys that a query sees at most; None: all. check_layout refuses runs that would notice it."""
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    torch_dtype: str | None
    """Dtype of the stored weights, e.g. bfloat16, where config.json says."""
    moe: MoeArchitecture | None
    """The experts of every layer; None: a dense model."""

    @property
    def fingerprint(self) -> str:
        """Text that tells architectures apart. The cached reference's files are named by it, so it stays the same from
        version to version: a field that comes later has a default, and is in the text only where it differs from that."""
        return _text(self)


def _text(value: Any) -> str:
    if not dataclasses.is_dataclass(value):
        return repr(value)
    words = []
    for field in dataclasses.fields(value):
        of_field = getattr(value, field.name)
        if field.default is dataclasses.MISSING or of_field != field.default:
            words.append(f"{field.name}={_text(of_field)}")
        if field.name == "qkv_bias":  # two fields of the first version, which were always False
            words.append("output_bias=False, mlp_bias=False")
    return f"{type(value).__name__}({', '.join(words)})"
