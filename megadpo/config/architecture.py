"""The neutral description of a model: what common code builds, checks and plans from.

megadpo/families reads it from a Hugging Face folder's config.json; nothing else asks for a family by name. What differs
between layers is said layer by layer. Everything here can be compared and hashed, so that layers of a kind are known as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How frequencies differ from plain RoPE's: every number of `rope_type`'s formula (model/rope.py), and None for those
    that it has not."""

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    attention_factor: float = 1.0
    """On cos and sin."""
    short_factor: tuple[float, ...] = ()
    """longrope's divisors of the frequencies up to original_max_position_embeddings. Longer pairs are refused: the choice
    of the others goes by the longest sequence of a batch, so a shared prompt would be turned in two ways."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: which channels of a head are turned, and how fast."""

    theta: float
    dims: int
    """Channels that are turned, the first ones of a head."""
    interleaved: bool = False
    """Pairs are neighbours, 0 and 1, 2 and 3; else channel i of the first half and channel i of the second."""
    scaling: RopeScaling | None = None
    """None: plain RoPE."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest text for which these are the model's positions; None: there is no such limit."""
        if self.scaling is None or self.scaling.rope_type != "longrope":
            return None
        return self.scaling.original_max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): projections by way of a narrower vector, which has a norm."""

    q_rank: int | None
    """Width of the queries' vector; None: they are projected from the hidden state."""
    kv_rank: int
    """Of the vector of keys and values."""
    rope_dim: int
    """The last channels of a head, which alone are turned; of keys, they are the same in all heads."""
    norm_eps: float = 1e-6
    """Of the norms of these vectors, whatever the other norms have."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention of one layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Channels of a query and of a key."""
    value_dim: int
    """Channels of a value."""
    scale: float
    """What a query times a key is multiplied by."""
    rotary: Rotary | None
    """None: positions are not told apart."""
    window: int | None = None
    """Keys that a query sees at most, its own included; None: all."""
    logit_softcap: float | None = None
    """c: scores become c * tanh(score / c)."""
    sinks: bool = False
    """A learned number a head joins the softmax as one more score, whose value is 0."""
    qkv_bias: bool = False
    """Bias of the query, key and value projections."""
    output_bias: bool = False
    """Bias of the projection after attention."""
    qk_norm: Literal["none", "head", "head_after_rope", "width"] = "none"
    """RMSNorm of queries and keys: of each head before RoPE or after it, or of all heads together before it."""
    latent: Latent | None = None
    """None: queries, keys and values are projected from the hidden state."""
    output_gate: bool = False
    """A head's output is multiplied by the sigmoid of a gate, which is projected beside its query."""

    @property
    def query_heads(self) -> int:
        """Heads that the queries' projection gives, gates counted."""
        return 2 * self.num_heads if self.output_gate else self.num_heads

    def weights(self, hidden: int) -> int:
        """Of its projections, biases aside. hidden: the model's width."""
        values = self.num_heads * self.value_dim
        if self.latent is None:
            return hidden * (
                (self.query_heads + self.num_kv_heads) * self.head_dim + self.num_kv_heads * self.value_dim + values
            )
        one, queries = self.latent, self.num_heads * self.head_dim
        from_hidden = queries if one.q_rank is None else one.q_rank
        keys = self.num_heads * (self.head_dim - one.rope_dim)
        made = (one.q_rank or 0) * queries + one.kv_rank * (keys + values)
        return hidden * (from_hidden + one.kv_rank + one.rope_dim + values) + made


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """A gated delta net in the place of attention (arXiv 2412.06464): each head has a state of `key_dim` x `value_dim`
    numbers, which every token writes to and reads. model/delta_net.py has the formula."""

    key_heads: int
    value_heads: int
    """A multiple of key_heads: so many have the same queries and keys."""
    key_dim: int
    """Channels of a query and of a key."""
    value_dim: int
    conv_width: int
    """Tokens that the convolution of queries, keys and values sees, the own one included."""

    @property
    def conv_channels(self) -> int:
        """Of all queries, keys and values of a token."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def in_channels(self) -> int:
        """What the hidden state is projected to: those, a gate for each value, and two numbers for each value head."""
        return self.conv_channels + self.value_heads * (self.value_dim + 2)

    @property
    def state_products(self) -> int:
        """Multiply-adds of a token with the states: what its keys find there, what it writes, what its queries find."""
        return 3 * self.value_heads * self.key_dim * self.value_dim

    def weights(self, hidden: int) -> int:
        """Of its projections. hidden: the model's width."""
        return hidden * (self.in_channels + self.value_heads * self.value_dim)


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A gated MLP: down(activation(gate(x)) * up(x))."""

    ffn_size: int
    activation: Literal["silu", "gelu_tanh", "clamped"] = "silu"
    """gelu_tanh: GELU in its form with tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415). clamped: with the gate at most
    `limit` and the other side between -limit and limit, gate * sigmoid(1.702 gate) * (1 + other)."""
    limit: float | None = None
    """Of `clamped` alone."""
    bias: bool = False
    """Of both projections."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """Which experts a token goes to, those with the highest scores, and with what weights."""

    scores: Literal["softmax", "softmax_of_chosen", "sigmoid"]
    """Scores are a softmax over all experts' logits, or each logit's sigmoid. softmax_of_chosen: the logits choose, and
    weights are a softmax over those of the chosen experts alone. Else weights are the chosen experts' scores."""
    correction_bias: bool = False
    """A number an expert is added to scores for the choice alone. The model's folder has it; it is not trained."""
    groups: int = 1
    """Experts stand in groups, of which a token's best `chosen_groups` count: by the sum of a group's best scores."""
    chosen_groups: int = 1
    best_of_group: int = 2
    """How many scores of a group are added."""
    normalized: bool = False
    """A token's weights are divided by their sum, of at least `least_sum`."""
    least_sum: float = 0.0
    factor: float = 1.0
    """What weights are multiplied by."""
    bias: bool = False
    """Of the logits."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a layer."""

    number: int
    per_token: int
    mlp: Mlp
    """Of each expert."""
    router: Router
    shared_ffn_size: int | None
    """Of the shared expert, which every token goes through; None: there is none."""
    aux_loss_coef: float
    """The model's own router_aux_loss_coef."""
    shared_gate: bool = True
    """The shared expert's output is multiplied by the sigmoid of a gate of its own."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: attention or a delta net, then an MLP or experts, with norms where `Norms` says."""

    attention: Attention | DeltaNet
    feed_forward: Mlp | Experts


@dataclass(frozen=True, kw_only=True)
class Norms:
    """RMSNorm, everywhere."""

    eps: float
    zero_centred: bool = False
    """Norms multiply by 1 + their weight."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    """Of a layer's two parts: norms before each, after each and before the residual is added, or both."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder, sizes in elements. There is a bias or a norm only where a field says so. Heads and their widths are the
    same in every layer that has attention, which one has at least; so are all delta nets, all dense MLPs, and all layers
    of experts."""

    family: str
    """Which of FAMILIES reads its config.json and has its weight table."""
    hf_class: str
    """Class name in config.json, e.g. LlamaForCausalLM."""
    hidden_size: int
    vocab_size: int
    layers: tuple[Layer, ...]
    norms: Norms
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_id: int | tuple[int, ...] | None
    pad_token_id: int | None
    torch_dtype: str | None
    """Dtype of the stored weights, e.g. bfloat16, where config.json says."""
    dropout: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Keys of config.json that ask for dropout, which is never applied: log-probabilities are compared."""
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    """To the weights' dtype, before it multiplies."""
    residual_multiplier: float = 1.0
    """Of what each part of a layer adds to the residual stream."""
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    """c: the head's logits become c * tanh(logit / c)."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> Attention:
        """The first one, for the sizes, which all have in common."""
        return self.attentions[0]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The kinds there are, in the order of the layers."""
        return tuple(dict.fromkeys(one.attention for one in self.layers if isinstance(one.attention, Attention)))

    @property
    def delta_net(self) -> DeltaNet | None:
        """Of the layers that have one; None where all have attention."""
        return next((one.attention for one in self.layers if isinstance(one.attention, DeltaNet)), None)

    @property
    def mlp(self) -> Mlp | None:
        """Of the dense layers; None where every layer has experts."""
        return next((one.feed_forward for one in self.layers if isinstance(one.feed_forward, Mlp)), None)

    @property
    def experts(self) -> Experts | None:
        """Of the layers that have them; None for a dense model."""
        return next((one.feed_forward for one in self.layers if isinstance(one.feed_forward, Experts)), None)

    @property
    def mixed(self) -> bool:
        """Whether some layers have experts and others have none."""
        return self.mlp is not None and self.experts is not None

    @property
    def layers_differ(self) -> bool:
        """Whether some layers have other parameters than others."""
        return self.mixed or self.delta_net is not None

    @property
    def fingerprint(self) -> str:
        """Text that tells architectures apart. The cached reference's files are named by it, so it stays the same from
        version to version: a field that comes later has a default, and is in the text only where it differs from that."""
        return _text(self)

    def with_attention(self, only: Collection[int] | None = None, **changes: Any) -> Architecture:
        """The same with these fields in every layer's attention. only: in these layers', by number."""
        layers = list(self.layers)
        for number in range(self.num_layers) if only is None else only:
            attention = layers[number].attention
            if isinstance(attention, Attention):
                attention = dataclasses.replace(attention, **changes)
                layers[number] = dataclasses.replace(layers[number], attention=attention)
        return dataclasses.replace(self, layers=tuple(layers))

    def with_delta_net(self, delta_net: DeltaNet, only: Collection[int]) -> Architecture:
        """The same with this in the place of attention in these layers, by number."""
        layers = list(self.layers)
        for number in only:
            layers[number] = dataclasses.replace(layers[number], attention=delta_net)
        return dataclasses.replace(self, layers=tuple(layers))

    def with_feed_forward(self, feed_forward: Mlp | Experts, only: Collection[int] | None = None) -> Architecture:
        """The same with this in every layer. only: in these layers, by number."""
        layers = list(self.layers)
        for number in range(self.num_layers) if only is None else only:
            layers[number] = dataclasses.replace(layers[number], feed_forward=feed_forward)
        return dataclasses.replace(self, layers=tuple(layers))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    words = []
    for field in dataclasses.fields(value):
        of_field = getattr(value, field.name)
        if field.compare and (field.default is dataclasses.MISSING or of_field != field.default):
            words.append(f"{field.name}={_text(of_field)}")
    return f"{type(value).__name__}({', '.join(words)})"
