"""The fingerprint of an architecture, which names files of earlier runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.families import parse_architecture
from tests.families.configs import QWEN2_MOE

# As the version wrote it that first told layers apart.
LAYER = (
    "Layer(attention=Attention(num_heads=4, num_kv_heads=2, head_dim=16, value_dim=16, scale=0.25, rotary=Rotary("
    "theta=10000.0, dims=16, scaling=RopeScaling(rope_type='linear', factor=2.0)), qkv_bias=True), feed_forward=Experts("
    "number=8, per_token=2, mlp=Mlp(ffn_size=48), router=Router(scores='softmax'), shared_ffn_size=5632, "
    "aux_loss_coef=0.001))"
)
FIRST = (
    "Architecture(family='qwen2_moe', hf_class='Qwen2MoeForCausalLM', hidden_size=64, vocab_size=256, layers=("
    f"{LAYER}, {LAYER}, {LAYER}, {LAYER}), norms=Norms(eps=1e-06), max_position_embeddings=4096, "
    "tie_word_embeddings=False, eos_token_id=(1, 2), pad_token_id=None, torch_dtype=None)"
)
ARCH = parse_architecture({**QWEN2_MOE, "rope_scaling": {"type": "linear", "factor": 2}, "eos_token_id": [1, 2]})


def test_files_of_the_first_version_are_found():
    assert ARCH.fingerprint == FIRST
    assert dataclasses.replace(ARCH, eos_token_id=3).fingerprint != FIRST
    assert ARCH.with_attention(window=5).fingerprint == FIRST.replace("qkv_bias", "window=5, qkv_bias")


def test_a_field_that_came_later_counts_only_where_it_is_set():
    @dataclass(frozen=True, kw_only=True)
    class Later(Architecture):
        softcap: float | None = None

    values = {field.name: getattr(ARCH, field.name) for field in dataclasses.fields(ARCH)}
    assert Later(**values).fingerprint == FIRST.replace("Architecture(family", "Later(family")
    assert Later(**values, softcap=30.0).fingerprint.endswith(", softcap=30.0)")


def test_layers_of_a_kind_are_known_as_such():
    other = dataclasses.replace(ARCH.layers[0], attention=dataclasses.replace(ARCH.attention, window=5))
    mixed = dataclasses.replace(ARCH, layers=(ARCH.layers[0], other) * 2)
    assert mixed.attentions == (ARCH.attention, other.attention) and mixed.num_layers == 4
    assert mixed.experts == ARCH.experts and mixed.mlp is None
