"""Where a query sees a window of its keys: Mistral's whole model, some layers of Qwen."""

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
