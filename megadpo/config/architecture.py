"""A model's description that names no family. Common code builds, checks and plans from it.

megadpo/families makes it from config.json of a Hugging Face folder; no other code asks for a family by name. Each layer has
its own description. All classes can be compared and hashed, so equal layers are easy to find.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies differ from those of plain RoPE: the numbers in the formula of `rope_type` (model/rope.py). A
    number that the formula lacks is None."""

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    attention_factor: float = 1.0
    """cos and sin are multiplied by it."""
    short_factor: tuple[float, ...] = ()
    """longrope's divisors of the frequencies for texts up to original_max_position_embeddings. Longer pairs are refused:
    transformers chooses the other divisors by the longest sequence of a batch, so one prompt would have two rotations."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding (RoPE): which channels of a head are rotated, and with which frequencies."""

    theta: float
    dims: int
    """Channels that are rotated: the first ones of a head."""
    interleaved: bool = False
    """True: channels 0 and 1, 2 and 3, ... are rotated together; else channel i of the first half with channel i of the
    second."""
    scaling: RopeScaling | None = None
    """None: plain RoPE."""

    @property
    def longest(self) -> int | None:
        """The longest text in tokens for which these frequencies are the model's; None: no limit."""
        if self.scaling is None or self.scaling.rope_type != "longrope":
            return None
        return self.scaling.original_max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (arXiv 2405.04434): queries, keys and values are projected from narrower vectors
    (latents), which have norms."""

    q_rank: int | None
    """Width of the queries' latent; None: queries are projected from the hidden state."""
    kv_rank: int
    """Width of the latent of keys and values."""
    rope_dim: int
    """The last channels of a head; only these are rotated. Those of the keys are the same in all heads."""
    norm_eps: float = 1e-6
    """Of the latents' norms. Other norms have their own."""


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
    """Factor of the product of a query and a key."""
    rotary: Rotary | None
    """None: no position embedding."""
    window: int | None = None
    """Most keys that a query sees, including its own; None: all."""
    logit_softcap: float | None = None
    """c: scores become c * tanh(score / c)."""
    sinks: bool = False
    """Each head has a learned number that enters the softmax as one more score, with the value 0."""
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

    @property
    def turns_projection(self) -> bool:
        """Whether RoPE is all that stands between the projection of queries and keys and attention."""
        plain = self.qk_norm == "none" and self.latent is None and not self.output_gate
        return self.rotary is not None and plain

    def weights(self, hidden: int) -> int:
        """Number of weights of the projections, without biases. hidden: the model's width."""
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
    """gelu_tanh: GELU by its tanh formula (Hendrycks and Gimpel 2016, arXiv 1606.08415). clamped: gate * sigmoid(1.702
    gate) * (1 + up), after gate is cut to at most `limit`, and up to between -limit and limit."""
    limit: float | None = None
    """For `clamped` only."""
    bias: bool = False
    """Whether both projections have biases."""


@dataclass(frozen=True, kw_only=True)
class Router:
    """Chooses each token's experts, those with the highest scores, and the weights of their outputs."""

    scores: Literal["softmax", "softmax_of_chosen", "sigmoid"]
    """softmax: over the logits of all experts. sigmoid: of each logit. For both, the weights are the scores of the chosen
    experts. softmax_of_chosen: the scores are the logits, and the weights a softmax over the chosen ones."""
    correction_bias: bool = False
    """Each expert has a number that is added to its score for the choice only. It is in the model's folder and not
    trained."""
    groups: int = 1
    """The experts are divided into groups. A token's experts come from the `chosen_groups` groups whose `best_of_group`
    highest scores have the largest sum."""
    chosen_groups: int = 1
    best_of_group: int = 2
    normalized: bool = False
    """A token's weights are divided by their sum, or by `least_sum` if that is larger."""
    least_sum: float = 0.0
    factor: float = 1.0
    """The weights are multiplied by it."""
    bias: bool = False
    """Whether the logits have a bias."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a layer."""

    number: int
    per_token: int
    mlp: Mlp
    """One expert."""
    router: Router
    shared_ffn_size: int | None
    """Width of the shared expert, which every token goes through; None: there is none."""
    aux_loss_coef: float
    """router_aux_loss_coef of the model's config.json."""
    shared_gate: bool = True
    """The shared expert's output is multiplied by the sigmoid of a gate."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A decoder layer: attention or a delta net, then an MLP or experts, with norms where `Norms` says."""

    attention: Attention | DeltaNet
    feed_forward: Mlp | Experts


@dataclass(frozen=True, kw_only=True)
class Norms:
    """All norms are RMSNorms."""

    eps: float
    zero_centred: bool = False
    """Norms multiply by 1 + weight."""
    placement: Literal["pre", "post", "sandwich"] = "pre"
    """pre: a norm before attention and before the MLP. post: after each, before the residual is added. sandwich: both."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder; sizes in elements. Biases and norms exist only where a field says so. The number of heads and their widths
    are the same in every layer that has attention; at least one layer has it. All delta nets are equal, and so are all dense
    MLPs, and all layers of experts."""

    family: str
    """Name of the family, in FAMILIES, that reads config.json and has the weight table."""
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
    """Dtype of the stored weights, such as bfloat16, if config.json says it."""
    dropout: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """Keys of config.json that ask for dropout. It is never applied, since log-probabilities are compared."""
    media_tokens: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    """Ids of tokens for which a vision-language model inserts an image or a video."""
    embedding_multiplier: float = 1.0
    embedding_multiplier_rounded: bool = False
    """Whether the multiplier is first rounded to the weights' dtype."""
    residual_multiplier: float = 1.0
    """Factor of the outputs of attention and MLP before they are added to the residual stream."""
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    """c: the head's logits become c * tanh(logit / c)."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> Attention:
        """The first one, for sizes that are the same in all layers that have attention."""
        return self.attentions[0]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The different kinds of attention, in the order of the layers."""
        return tuple(dict.fromkeys(one.attention for one in self.layers if isinstance(one.attention, Attention)))

    @property
    def delta_net(self) -> DeltaNet | None:
        """Of the layers that have one; None if all layers have attention."""
        return next((one.attention for one in self.layers if isinstance(one.attention, DeltaNet)), None)

    @property
    def mlp(self) -> Mlp | None:
        """The MLP of the dense layers; None if every layer has experts."""
        return next((one.feed_forward for one in self.layers if isinstance(one.feed_forward, Mlp)), None)

    @property
    def experts(self) -> Experts | None:
        """The experts of the layers that have them; None for a dense model."""
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
        """Text that differs between architectures. The cached reference's files are named by it, so it must not change
        between versions: a field that is added later has a default, and is in the text only if its value differs."""
        return _text(self)

    def with_attention(self, only: Collection[int] | None = None, **changes: Any) -> Architecture:
        """A copy with these fields in every layer's attention. only: numbers of the layers to change."""
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
        """A copy with this MLP or these experts in every layer. only: numbers of the layers to change."""
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
