"""Gemma 3 with 4 billion parameters and more: a text model and a vision tower. Only the text model is trained."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.gemma import Gemma3Text
from megadpo.families.reading import HfConfig, with_media_tokens


@FAMILIES.add("gemma3")
class Gemma3(Gemma3Text):
    """The tower's tensors are kept unchanged."""

    classes = ("Gemma3ForConditionalGeneration",)
    defaults = Gemma3Text.defaults | {"image_token_index": 262144}
    prefix = "language_model."

    def read(self, config: HfConfig) -> Architecture:
        text = config.of_text()
        text.refuse("final_logit_softcapping", "null", "transformers doesn't compute it for this class")
        return with_media_tokens(super().read(text), config)

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return ("vision_tower.*", "multi_modal_projector.*")
