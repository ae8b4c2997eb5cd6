"""The `policy.megatron_cfg.peft` section: LoRA (Hu et al. 2021, arXiv 2106.09685). docs/lora.md explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megadpo.config.types import PositiveFloat, PositiveInt, Precision, Proportion, Text

Init = Literal["xavier", "kaiming", "normal", "zero"]


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """`policy.megatron_cfg.peft`: adapters on the linear layers, W x + scale * B A x, where only A and B are trained."""

    enabled: bool = False
    """true: LoRA. Every weight of the model is frozen; only adapters have gradients and optimizer state."""
    target_modules: tuple[Text, ...] = ()
    """Linear layers that get an adapter: megatron-core's names (linear_qkv, linear_proj, linear_fc1, linear_fc2; one A for
    all parts of a fused layer), the Hugging Face model's names (q_proj, ...; one A each), or whole paths with wildcards, such
    as "*.layers.0.*.linear_qkv". []: all, by megatron-core's names; [all-linear]: all, by Hugging Face's."""
    exclude_modules: tuple[Text, ...] = ()
    """Linear layers without an adapter, by the same names."""
    dim: PositiveInt = 8
    """Rank: rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """The scale is alpha / dim."""
    use_rslora: bool = False
    """true: the scale is alpha / sqrt(dim) (Kalajdzievski 2023, arXiv 2312.03732)."""
    dropout: Proportion = 0.0
    """Share of values that are set to 0 in training."""
    dropout_position: Literal["pre", "post"] = "post"
    """pre: of the adapter's input, as in PEFT. post: of its output."""
    lora_A_init_method: Init = "xavier"  # noqa: N815  NeMo RL's name
    """Initial values of A. xavier: normal. kaiming: uniform, as in PEFT. normal: with standard deviation 0.2."""
    lora_B_init_method: Init = "zero"  # noqa: N815
    """Initial values of B. zero: at the first step the model computes the same as without adapters."""
    lora_dtype: Precision | None = None
    """Dtype of A and B, and of their products. null: policy.precision."""
    init_from: Text | None = None
    """Folder of a PEFT adapter to start from: adapter_config.json and adapter_model.safetensors. Its targets, rank and
    alpha must be those of this section."""

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)
