"""`prompt`, `chosen_response` and `rejected_response`, as NeMo RL's DPODataset."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, Row, RowFormat
from megadpo.data.formats.fields import pair_with_prompt, read_fields
from megadpo.data.sources import Place

_FIELDS = ("prompt", "chosen_response", "rejected_response")


@FORMATS.add("DPODataset")
class DPODataset(RowFormat):
    def fields(self) -> tuple[str, ...]:
        return _FIELDS

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        texts = read_fields(row, dict.fromkeys(_FIELDS), place, prompt="prompt")
        return texts if isinstance(texts, list) else pair_with_prompt(row, place, *(texts[name] for name in _FIELDS))
