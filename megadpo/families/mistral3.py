"""Mistral Small 3.1 and 3.2: a Mistral and a vision tower. Only the Mistral is trained."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.mistral import Mistral
from megadpo.families.reading import HfConfig, with_media_tokens


@FAMILIES.add("mistral3")
class Mistral3(Mistral):
    """The tower's tensors are kept unchanged."""

    classes = ("Mistral3ForConditionalGeneration",)
    defaults = Mistral.defaults | {
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "head_dim": 128,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e9,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "image_token_index": 10,
    }
    prefix = "language_model."

    def read(self, config: HfConfig) -> Architecture:
        text = config.of_text()
        text.refuse("model_type", "mistral or ministral", "choose a model with a Mistral for texts", unless=_TEXTS)
        return with_media_tokens(super().read(text), config)

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return ("vision_tower.*", "multi_modal_projector.*")


_TEXTS = (None, "mistral", "ministral", "mistral3")
