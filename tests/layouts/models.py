"""The models of the matrix: random weights in Hugging Face form, of sizes that every layout of the matrix divides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.overrides import BALANCE
from tests.helpers.runs import make_model

LAYERS = 8
"""Two stages of two chunks, evenly (4 + 4) and unevenly (2 + 6)."""


@dataclass(frozen=True)
class Model:
    """One table of docs/layouts.md."""

    name: str
    about: str
    family: str
    """Of tests/model/weights/hf_models.py."""
    has_experts: bool = False
    megatron: dict[str, Any] = field(default_factory=dict)
    """Merged into policy.megatron_cfg of every run."""

    def make(self, folder: Path) -> Path:
        """Write it to `folder`."""
        return make_model(folder, self.family, num_hidden_layers=LAYERS)


MODELS: tuple[Model, ...] = (
    Model("dense", "Qwen3: output layer of its own, QK norms", "qwen3"),
    Model("tied", "Llama: output layer tied to the embedding", "llama_tied"),
    Model("MoE", "Qwen3-MoE: 4 experts, 2 a token, seq_aux_loss", "qwen3_moe", has_experts=True, megatron=BALANCE),
)
