"""The base of the model families: reads config.json, and has the weight rows of a Llama-shaped model."""

from __future__ import annotations

from typing import Any, ClassVar

from megadpo.config.architecture import Architecture, Attention, Layer, Mlp, Norms, Rotary
from megadpo.families.reading import MOST_LAYERS, HfConfig
from megadpo.families.rope import read_rope
from megadpo.families.rows import ATTENTION, EMBEDDING, FINAL_NORM, HEAD, MLP, Row


class Family:
    """Base of the families: a Llama-shaped model. `@FAMILIES.add(name)` registers a subclass under its model_type.

    A family overrides what differs: class names, defaults, `read` (facts of its layers, and refusals), `layer` and the three
    rows outside the layers (its weights). An instance has no state.
    """

    classes: ClassVar[tuple[str, ...]]
    """Class names under `architectures` in config.json. The first is taken if a file names none."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Other model_types of these classes."""
    defaults: ClassVar[dict[str, Any]] = {
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    """transformers' values for keys that config.json lacks."""
    activation: ClassVar[tuple[str, tuple[str, ...]]] = ("hidden_act", ("silu", "swish"))
    """The key of the MLP's activation, and its names there."""
    biases: ClassVar[tuple[str, ...]] = ("attention_bias", "mlp_bias")
    """Keys of biases that the family doesn't have: true is refused."""
    prefix: ClassVar[str] = ""
    """What the names of all tensors of `layer`, `embedding`, `final_norm` and `head` begin with on disk, before these."""
    layer_types: ClassVar[tuple[str, ...]] = ("full_attention", "sliding_attention")
    """Names of layers under `layer_types`; others are refused."""
    embedding: ClassVar[Row] = EMBEDDING
    final_norm: ClassVar[Row] = FINAL_NORM
    head: ClassVar[Row] = HEAD

    def read(self, config: HfConfig) -> Architecture:
        """The model that `config` describes. Problems are added to `config`; the result is valid only without problems."""
        hidden = config.size("hidden_size")
        layers = config.size("num_hidden_layers", most=MOST_LAYERS)
        heads, ffn, vocabulary = map(config.size, ("num_attention_heads", "intermediate_size", "vocab_size"))
        # in transformers, null key-value heads mean as many as heads, and a null head size means hidden size / heads
        groups = heads if config.get("num_key_value_heads") is None else config.size("num_key_value_heads")
        length = config.size("max_position_embeddings")
        head_dim = self.head_dim(config, hidden, heads)
        if not config.problems and heads % groups:
            config.report("num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
        eps = config.number("rms_norm_eps")
        self._refuse_uncomputed(config)
        attention = Attention(
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=head_dim,
            value_dim=head_dim,
            scale=head_dim**-0.5,
            rotary=self.rotary(config, head_dim, length),
        )
        eos = config.get("eos_token_id")
        return Architecture(
            family=config.family,
            hf_class=config.hf_class,
            hidden_size=hidden,
            vocab_size=vocabulary,
            layers=(Layer(attention=attention, feed_forward=Mlp(ffn_size=ffn)),) * layers,
            norms=Norms(eps=eps),
            max_position_embeddings=length,
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=config.get("pad_token_id"),
            torch_dtype=config.get("dtype") or config.get("torch_dtype"),
            dropout=tuple(key for key in _DROPOUTS if config.raw.get(key)),
        )

    def head_dim(self, config: HfConfig, hidden: int, heads: int) -> int:
        """Channels of a query and of a key."""
        if config.get("head_dim") is not None:
            return config.size("head_dim")
        if hidden % heads and not config.problems:
            config.report("num_attention_heads", heads, f"a divisor of hidden_size {hidden}")
        return max(1, hidden // heads)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        """The RoPE of every layer. length: max_position_embeddings."""
        return read_rope(config, head_dim, length)

    def on_disk(self, name: str) -> str:
        """What a tensor is called in folders, by its name in the rows of `layer` (behind a layer's number), `embedding`,
        `final_norm` and `head`."""
        return self.prefix + name

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        """Shell patterns of tensors on disk that nothing here computes with, such as a vision tower's: folders may have them,
        and exports then have them too, as they are."""
        return ()

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        """The rows of layer `number`, from 0."""
        return ATTENTION + MLP

    def refuse_quantised(self, config: HfConfig) -> None:
        """Refuses quantised weights that the family can't read."""
        config.refuse("quantization_config", "none", AS_FLOATS)

    def _refuse_uncomputed(self, config: HfConfig) -> None:
        key, names = self.activation
        config.refuse(
            key, " or ".join(names), "models of this class with another activation are not supported", unless=names
        )
        for key in self.biases:
            config.refuse(key, "false", f"models with {key} are not supported")
        self.refuse_quantised(config)
        unknown = sorted({str(kind) for kind in config.raw.get("layer_types") or ()} - {*self.layer_types})
        if unknown:
            expected = f"{' and '.join(self.layer_types)} only"
            config.report("layer_types", ", ".join(unknown), expected, "choose a model with plain attention")


AS_FLOATS = "export the model's weights in bfloat16 or float32 and train those"
_DROPOUTS = ("attention_dropout", "residual_dropout", "resid_pdrop", "embd_pdrop")
