"""The fingerprint of an architecture, which names files of earlier runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.families import parse_architecture
from tests.families.configs import QWEN2_MOE

# As the first version wrote it.
FIRST = (
    "Architecture(family='qwen2_moe', hf_class='Qwen2MoeForCausalLM', hidden_size=64, num_layers=4, num_heads=4, "
    "num_kv_heads=2, head_dim=16, ffn_hidden_size=128, vocab_size=256, rms_norm_eps=1e-06, rope_theta=10000.0, "
    "rope_scaling={'rope_type': 'linear', 'factor': 2.0}, max_position_embeddings=4096, tie_word_embeddings=False, "
    "qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=False, sliding_window=None, eos_token_id=(1, 2), "
    "pad_token_id=None, torch_dtype=None, moe=MoeArchitecture(num_experts=8, experts_per_token=2, ffn_hidden_size=48, "
    "normalized_weights=False, shared_ffn_hidden_size=5632, aux_loss_coef=0.001))"
)
ARCH = parse_architecture({**QWEN2_MOE, "rope_scaling": {"type": "linear", "factor": 2}, "eos_token_id": [1, 2]})


def test_files_of_the_first_version_are_found():
    assert ARCH.fingerprint == FIRST
    assert dataclasses.replace(ARCH, eos_token_id=3).fingerprint != FIRST


def test_a_field_that_came_later_counts_only_where_it_is_set():
    @dataclass(frozen=True, kw_only=True)
    class Later(Architecture):
        softcap: float | None = None

    values = {field.name: getattr(ARCH, field.name) for field in dataclasses.fields(ARCH)}
    assert Later(**values).fingerprint == FIRST.replace("Architecture(family", "Later(family")
    assert Later(**values, softcap=30.0).fingerprint.endswith(", softcap=30.0)")
