"""Where a query sees a window of its keys: in every layer, or in some."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError
from megadpo.families import parse_architecture
from tests.families.configs import LLAMA

ALL, NONE = [99] * 4, [None] * 4
QWEN = {"sliding_window": 99, "use_sliding_window": True}
TYPES = ["full_attention", "sliding_attention"] * 2
SLIDING = [
    ("MistralForCausalLM", {"sliding_window": 99}, ALL),
    ("MistralForCausalLM", {"sliding_window": None}, NONE),
    ("MistralForCausalLM", {}, [4096] * 4),
    ("MistralForCausalLM", {"sliding_window": 99, "layer_types": TYPES}, [None, 99, None, 99]),
    ("MinistralForCausalLM", {"sliding_window": 99, "layer_types": TYPES}, [None, 99, None, 99]),
    ("Qwen2ForCausalLM", {"sliding_window": 99, "use_sliding_window": False, "max_window_layers": 2}, NONE),
    ("Qwen2ForCausalLM", {"sliding_window": 99, "max_window_layers": 2}, NONE),
    ("Qwen2ForCausalLM", {**QWEN, "max_window_layers": 4}, NONE),
    ("Qwen2ForCausalLM", {**QWEN, "max_window_layers": 3}, [None, None, None, 99]),
    ("Qwen3ForCausalLM", {**QWEN, "layer_types": TYPES}, [None, 99, None, 99]),
    ("Qwen3ForCausalLM", {**QWEN, "layer_types": ["full_attention"] * 4}, NONE),
    ("Qwen3MoeForCausalLM", {**QWEN, "max_window_layers": 4}, ALL),
    ("Qwen2MoeForCausalLM", {**QWEN, "max_window_layers": 4}, [99, None, 99, None]),
    ("Qwen2MoeForCausalLM", {**QWEN, "max_window_layers": 2}, [99, None, None, None]),
    ("MixtralForCausalLM", {}, NONE),
    ("Phi3ForCausalLM", {"sliding_window": 99}, ALL),
    ("Phi3ForCausalLM", {}, NONE),
    ("SmolLM3ForCausalLM", {**QWEN}, [None, None, None, 99]),
    ("SmolLM3ForCausalLM", {"sliding_window": 99}, NONE),
    ("Olmo3ForCausalLM", {"sliding_window": 99}, [99, 99, 99, None]),
]


def raw_of(name, said):
    raw = {key: value for key, value in LLAMA.items() if key != "model_type"}
    return {**raw, "architectures": [name], **said}


@pytest.mark.parametrize(("name", "said", "windows"), SLIDING)
def test_windows_by_layer(name, said, windows):
    assert [layer.attention.window for layer in parse_architecture(raw_of(name, said)).layers] == windows


WRONG = [
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ({"layer_types": TYPES, "sliding_window": None}, "sliding_window"),
    ({"sliding_window": 0}, "sliding_window"),
]


@pytest.mark.parametrize(("said", "key"), WRONG)
def test_refused_by_name(said, key):
    with pytest.raises(ConfigError) as caught:
        parse_architecture(raw_of("MistralForCausalLM", said))
    assert [problem.where for problem in caught.value.problems] == [f"config.json: {key}"]
