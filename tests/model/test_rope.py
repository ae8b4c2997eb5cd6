"""RoPE frequencies against transformers, for every scaling that the families use."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from megadpo.families import read_architecture
from megadpo.model.rope import PlainRotation, RotaryTable

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
    ours = RotaryTable(read_architecture(tmp_path).attention.rotary, torch.device("cpu"))
    positions = torch.arange(0, 512, 7)
    x = torch.randn(len(positions), 4, 64)
    cos, sin = theirs(x[None], positions[None])
    want, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos, sin)
    got = ours(positions, torch.float32)(x)
    torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def te_rotation(t, freqs, tensor_format, fused, cu_seqlens):
    """What Transformer Engine's kernel computes of one packed sequence: row i of the angles for token i."""
    assert (tensor_format, fused) == ("thd", True) and cu_seqlens.tolist() == [0, len(t)]
    assert freqs.shape == (len(t), 1, 1, t.shape[-1]) and freqs.dtype == torch.float32
    x1, x2 = t.chunk(2, dim=-1)
    return t * freqs[:, 0].cos().to(t.dtype) + torch.cat([-x2, x1], dim=-1) * freqs[:, 0].sin().to(t.dtype)


@pytest.mark.parametrize("name", ["default", "llama3", "yarn"])
def test_the_fused_rotation_is_handed_the_same_angles(name, tmp_path, monkeypatch):
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=512,
        rope_parameters={**SCALINGS[name], "rope_theta": 10000.0},
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    stand_in = types.ModuleType("transformer_engine.pytorch.attention.rope")
    stand_in.apply_rotary_pos_emb = te_rotation
    for part in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.attention"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    rotary, device = read_architecture(tmp_path).attention.rotary, torch.device("cpu")
    plain, fused = RotaryTable(rotary, device), RotaryTable(rotary, device, fused=True)
    positions, x = torch.tensor([0, 1, 2, 0, 1, 300, 2]), torch.randn(7, 2, 64)
    assert fused.fused == (name != "yarn")  # its factor on cos and sin is not in the kernel
    torch.testing.assert_close(fused(positions, x.dtype)(x), plain(positions, x.dtype)(x), rtol=1e-6, atol=1e-6)


def plain_rotate(x, cos, sin):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def plain_interleaved(x, cos, sin):
    """Pairs 0 and 1, 2 and 3: brought into halves, turned, and brought back."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return plain_rotate(x[..., order], cos, sin)[..., [order.index(i) for i in range(8)]]


@pytest.mark.parametrize(("width", "interleaved"), [(8, False), (8, True), (12, False), (12, True)])
def test_rotate(width, interleaved):
    """The first 8 channels; those that follow stay."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, width, dtype=torch.float64, requires_grad=True)
    angles, upstream = torch.randn(6, 1, 4, dtype=torch.float64), torch.randn(6, 3, width, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    got, plain = PlainRotation(cos, sin, interleaved)(x), plain_interleaved if interleaved else plain_rotate
    want = torch.cat([plain(x[..., :8], cos, sin), x[..., 8:]], dim=-1)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out, x, upstream)[0] for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_rotate_takes_a_view_of_the_projection():
    """q, k and v are strided views of one tensor; the turned ones must not be."""
    qkv, turn = torch.randn(6, 3, 24), PlainRotation(torch.ones(6, 1, 4), torch.zeros(6, 1, 4))
    assert turn(qkv[..., :8]).is_contiguous()
    torch.testing.assert_close(turn(qkv[..., 8:16]), qkv[..., 8:16])
