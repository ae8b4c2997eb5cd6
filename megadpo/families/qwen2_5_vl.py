"""Qwen2.5-VL: a Qwen2 and a vision tower. Only the Qwen2 is trained."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Rotary
from megadpo.config.variants import FAMILIES
from megadpo.families.qwen import Qwen2
from megadpo.families.reading import HfConfig, with_media_tokens
from megadpo.families.rope import given_rope, read_rope


@FAMILIES.add("qwen2_5_vl")
class Qwen2VL(Qwen2):
    """The tower's tensors are kept unchanged. Files on the hub have the text model's keys at the top level."""

    classes = ("Qwen2_5_VLForConditionalGeneration",)
    defaults = Qwen2.defaults | {
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_window_layers": 80,
        "image_token_id": 151655,
        "video_token_id": 151656,
    }

    def read(self, config: HfConfig) -> Architecture:
        return with_media_tokens(super().read(config.of_text()), config)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        """Plain RoPE. (`mrope` has positions of time, height and width, which are equal for text.)"""
        spelling, given = given_rope(config)
        rope = {key: value for key, value in given.items() if key != "mrope_section"}
        if given.get("rope_type", given.get("type")) == "mrope":
            rope["rope_type"] = "default"
        return read_rope(config, head_dim, length, rope=(spelling, rope))

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return ("visual.*",)
