"""`prompt`, `chosen` and `rejected`; the config may rename them. A row that no format recognises is read as this one, so
that the error names the missing fields."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.data.formats import FieldKeys, PreferencePair, Row, RowFormat, register
from megadpo.data.formats.fields import pair_with_prompt, read_fields
from megadpo.data.sources import Place


def _read(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    names = {keys.prompt: "prompt_key", keys.chosen: "chosen_key", keys.rejected: "rejected_key"}
    texts = read_fields(row, names, place, prompt=keys.prompt)
    return texts if isinstance(texts, list) else pair_with_prompt(row, place, *(texts[name] for name in names))


BINARY_PREFERENCE = register(
    RowFormat(
        name="BinaryPreferenceDataset",
        read=_read,
        fields=lambda keys: (keys.prompt, keys.chosen, keys.rejected),
        keys=("prompt_key", "chosen_key", "rejected_key"),
    )
)
