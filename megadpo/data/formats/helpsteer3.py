"""`context`, `response1`, `response2` and `overall_preference`, as in nvidia/HelpSteer3. A negative preference is for
response1, a positive one for response2."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import HubDataset, PreferencePair, Row, RowFormat
from megadpo.data.formats.fields import pair_with_prompt, read_fields
from megadpo.data.sources import Place

_TEXTS = ("context", "response1", "response2")
_PREFERENCE = "overall_preference"


@FORMATS.add("HelpSteer3")
class HelpSteer3(RowFormat):
    hub = HubDataset("nvidia/HelpSteer3", "preference", "validation")

    def fields(self) -> tuple[str, ...]:
        return (*_TEXTS, _PREFERENCE)

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        texts = read_fields(row, dict.fromkeys(_TEXTS), place, prompt="context")
        preference = row.get(_PREFERENCE)
        where = str(place)
        if isinstance(preference, bool) or not isinstance(preference, int | float) or preference != preference:
            got = f"field {_PREFERENCE!r} with {preference!r}" if _PREFERENCE in row else f"no field {_PREFERENCE!r}"
            problem = Problem(
                where, got, "a number, below 0 for response1 and above 0 for response2", "give the row one"
            )
            return [*texts, problem] if isinstance(texts, list) else [problem]
        if isinstance(texts, list):
            return texts
        if preference == 0:
            fix = "remove the row: it expresses no preference"
            return [Problem(where, f"{_PREFERENCE} 0", "a preference for one of the two", fix)]
        better, worse = ("response1", "response2") if preference < 0 else ("response2", "response1")
        return pair_with_prompt(row, place, texts["context"], texts[better], texts[worse])
