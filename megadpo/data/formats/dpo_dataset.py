"""`prompt`, `chosen_response` and `rejected_response`, as NeMo RL's DPODataset."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.data.formats import FieldKeys, PreferencePair, Row, RowFormat, register
from megadpo.data.formats.fields import pair_with_prompt, read_fields
from megadpo.data.sources import Place

_FIELDS = ("prompt", "chosen_response", "rejected_response")


def _read(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    texts = read_fields(row, dict.fromkeys(_FIELDS), place, prompt="prompt")
    return texts if isinstance(texts, list) else pair_with_prompt(row, place, *(texts[name] for name in _FIELDS))


register(RowFormat(name="DPODataset", read=_read, fields=lambda keys: _FIELDS))
