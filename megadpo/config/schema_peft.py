"""The `policy.megatron_cfg.peft` section: LoRA (Hu et al. 2021, arXiv 2106.09685). docs/lora.md explains it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megadpo.config.types import PositiveFloat, PositiveInt, Precision, Proportion, Text

Init = Literal["xavier", "kaiming", "normal", "zero"]


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """`policy.megatron_cfg.peft`: train adapters on the linear layers, W x + scale * B A x, and leave W as it is."""

    enabled: bool = False
    """true: LoRA. Every weight of the model is frozen; the adapters alone have gradients and optimizer state."""
    target_modules: tuple[Text, ...] = ()
    """Linear layers, by megatron-core's names (linear_qkv, linear_proj, linear_fc1, linear_fc2: one A for all in it) or the
    Hugging Face model's (q_proj, ...: an A for each), or whole paths, with wildcards: "*.layers.0.*.linear_qkv". []: all, by
    megatron-core's names; [all-linear]: all, by Hugging Face's."""
    exclude_modules: tuple[Text, ...] = ()
    """Layers that get none, by the same names."""
    dim: PositiveInt = 8
    """Rank: rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """The scale is alpha / dim."""
    use_rslora: bool = False
    """true: the scale is alpha / sqrt(dim) (Kalajdzievski 2023, arXiv 2312.03732)."""
    dropout: Proportion = 0.0
    """Share of numbers that are set to 0 in training."""
    dropout_position: Literal["pre", "post"] = "post"
    """pre: of the adapter's input, as in PEFT. post: of its output."""
    lora_A_init_method: Init = "xavier"  # noqa: N815  NeMo RL's name
    """Where A begins. xavier: normal. kaiming: uniform, PEFT's way. normal: of standard deviation 0.2."""
    lora_B_init_method: Init = "zero"  # noqa: N815
    """Where B begins. zero: the first step's model is the model without adapters."""
    lora_dtype: Precision | None = None
    """Dtype of A and B, and of the products with them. null: policy.precision."""
    init_from: Text | None = None
    """Folder of a PEFT adapter to start from: adapter_config.json and adapter_model.safetensors. Its targets, rank and
    alpha must be the ones here."""

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.dim) if self.use_rslora else self.dim)
