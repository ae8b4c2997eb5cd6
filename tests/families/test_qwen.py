"""Where a query sees a window of its keys: Mistral's whole model, some layers of Qwen. And Qwen3's own size of a head."""

from __future__ import annotations

import pytest

from megadpo.families import parse_architecture
from tests.families.configs import LLAMA

SLIDING = [
    ("MistralForCausalLM", {"sliding_window": 4096}, 4096),
    ("MistralForCausalLM", {"sliding_window": None}, None),
    ("MistralForCausalLM", {}, 4096),
    ("Qwen2ForCausalLM", {"sliding_window": 99, "use_sliding_window": False, "max_window_layers": 2}, None),
    ("Qwen2ForCausalLM", {"sliding_window": 99, "max_window_layers": 2}, None),
    ("Qwen2ForCausalLM", {"sliding_window": 99, "use_sliding_window": True, "max_window_layers": 4}, None),
    ("Qwen2ForCausalLM", {"sliding_window": 99, "use_sliding_window": True, "max_window_layers": 3}, 99),
    ("Qwen3ForCausalLM", {"sliding_window": 99, "use_sliding_window": True, "layer_types": ["sliding_attention"]}, 99),
    ("Qwen3ForCausalLM", {"sliding_window": 99, "use_sliding_window": True, "layer_types": ["full_attention"]}, None),
    ("Qwen3MoeForCausalLM", {"sliding_window": 99, "use_sliding_window": True, "max_window_layers": 4}, 99),
    ("MixtralForCausalLM", {}, None),
]


@pytest.mark.parametrize(("name", "said", "window"), SLIDING)
def test_sliding_window(name, said, window):
    raw = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert parse_architecture({**raw, "architectures": [name], **said}).attention.window == window


def test_a_head_of_qwen3_has_a_size_of_its_own():
    raw = {**LLAMA, "hidden_size": 66, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert "head_dim" not in raw and raw["hidden_size"] % raw["num_attention_heads"]
    assert parse_architecture(raw).attention.head_dim == 128  # transformers' default for the class
