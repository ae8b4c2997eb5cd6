"""Gemma, Gemma 2 and the text models of Gemma 3: norms times 1 + weight, embeddings times sqrt(hidden size), GELU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from megadpo.config.architecture import Architecture, Mlp, Norms, Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import ATTENTION, MLP, QK_NORM, Row, norm_row
from megadpo.families.windows import having_windows, with_windows

_DEFAULTS = Family.defaults | {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_PRE_MLP_NORM, *_MLP = MLP
_SANDWICHED = (
    norm_row("self_attn_bda.norm", "post_attention_layernorm"),
    dataclasses.replace(_PRE_MLP_NORM, hf={"pre_feedforward_layernorm.weight": "h"}),
    *_MLP,
    norm_row("mlp_bda.norm", "post_feedforward_layernorm"),
)


@FAMILIES.add("gemma")
class Gemma(Family):
    """`gelu` in its files means the tanh form, as in transformers."""

    classes = ("GemmaForCausalLM",)
    defaults = _DEFAULTS | {"num_key_value_heads": 16}
    activation: ClassVar[tuple[str, tuple[str, ...]]] = ("hidden_act", ("gelu_pytorch_tanh", "gelu"))
    placement: ClassVar[Literal["pre", "sandwich"]] = "pre"

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config)
        config.refuse("use_bidirectional_attention", "false", "choose a model that sees earlier tokens only")
        assert arch.mlp is not None
        return dataclasses.replace(
            arch.with_feed_forward(Mlp(ffn_size=arch.mlp.ffn_size, activation="gelu_tanh")),
            norms=Norms(eps=arch.norms.eps, zero_centred=True, placement=self.placement),
            embedding_multiplier=arch.hidden_size**0.5,
            embedding_multiplier_rounded=True,
        )


@FAMILIES.add("gemma2")
class Gemma2(Gemma):
    """Norms before and after attention and MLP; soft-caps of scores and logits; a window in every second layer."""

    classes = ("Gemma2ForCausalLM",)
    defaults = _DEFAULTS | {
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    }
    activation: ClassVar[tuple[str, tuple[str, ...]]] = ("hidden_activation", ("gelu_pytorch_tanh",))
    placement = "sandwich"

    def read(self, config: HfConfig) -> Architecture:
        arch = (
            super()
            .read(config)
            .with_attention(
                scale=config.number("query_pre_attn_scalar") ** -0.5,
                logit_softcap=_softcap(config, "attn_logit_softcapping"),
            )
        )
        arch = dataclasses.replace(arch, logit_softcap=_softcap(config, "final_logit_softcapping"))
        if config.get("sliding_window") is None:
            config.report("sliding_window", None, "a whole number")
        return with_windows(config, arch, usual=lambda number: self.slides(config, number))

    def slides(self, config: HfConfig, number: int) -> bool:
        """Whether layer `number`, from 0, has the window, for files without `layer_types`."""
        return number % 2 == 0

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + _SANDWICHED


@FAMILIES.add("gemma3_text")
class Gemma3Text(Gemma2):
    """Norms of queries and keys instead of Gemma 2's soft-caps, and another RoPE in layers with windows."""

    classes = ("Gemma3ForCausalLM",)
    defaults = _DEFAULTS | {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    }

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("attn_logit_softcapping", "null", "transformers doesn't compute it for this class")
        arch = super().read(config).with_attention(qk_norm="head")
        rotary = self._of_kind(config, "sliding_attention", arch.attention.head_dim, arch.max_position_embeddings)
        return arch.with_attention(only=having_windows(arch), rotary=rotary)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        return self._of_kind(config, "full_attention", head_dim, length)

    def _of_kind(self, config: HfConfig, kind: str, head_dim: int, length: int) -> Rotary:
        """The RoPE of layers of this kind. In transformers 4's form rope_scaling and rope_theta are for full attention, and
        rope_local_base_freq is for sliding attention."""
        spelling, given = given_rope(config)
        theta = {"rope_theta": config.get("rope_theta" if kind == "full_attention" else "rope_local_base_freq")}
        if spelling == "rope_scaling":
            of_kind: Any = given if kind == "full_attention" else {}
        elif set(given) <= {"full_attention", "sliding_attention"}:
            spelling, of_kind = f"{spelling}.{kind}", given.get(kind) or {}
        else:
            config.report(spelling, given, "those of full_attention and of sliding_attention")
            of_kind = {}
        if not isinstance(of_kind, Mapping):
            config.report(spelling, of_kind, "a JSON object")
            of_kind = {}
        return read_rope(config, head_dim, length, rope=(spelling, {**theta, **of_kind}))

    def slides(self, config: HfConfig, number: int) -> bool:
        return (number + 1) % config.size("sliding_window_pattern") != 0

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + QK_NORM + _SANDWICHED


def _softcap(config: HfConfig, key: str) -> float | None:
    return None if config.get(key) is None else config.number(key)
