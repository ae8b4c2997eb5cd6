"""RoPE frequencies against transformers, for every scaling that the families use."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megadpo.config.architecture import read_architecture
from megadpo.model.rope import RotaryTable

SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn_settings": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 0.9,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_cos_and_sin_equal_transformers(name, theta, tmp_path):
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=512,
        rope_parameters={**SCALINGS[name], "rope_theta": theta},
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    theirs = LlamaRotaryEmbedding(config)
    ours = RotaryTable(read_architecture(tmp_path), torch.device("cpu"))
    positions = torch.arange(0, 512, 7)
    x = torch.randn(len(positions), 4, 64)
    cos, sin = theirs(x[None], positions[None])
    want, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos, sin)
    got = ours(positions, torch.float32)(x)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-6, atol=1e-6)
