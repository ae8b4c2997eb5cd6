"""`prompt`, `chosen` and `rejected`; the config may rename them. A row that no format recognises is read as this one, so
that the error names the missing fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.types import Text
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, Row
from megadpo.data.formats.fields import AnswerKeys, pair_with_prompt, read_fields
from megadpo.data.formats.read_pairs import USUAL
from megadpo.data.sources import Place


@FORMATS.add(USUAL)
@dataclass(frozen=True, kw_only=True)
class BinaryPreference(AnswerKeys):
    prompt_key: Text = "prompt"
    """What the rows call the prompt."""

    def fields(self) -> tuple[str, ...]:
        return (self.prompt_key, self.chosen_key, self.rejected_key)

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        names = {self.prompt_key: "prompt_key", self.chosen_key: "chosen_key", self.rejected_key: "rejected_key"}
        texts = read_fields(row, names, place, prompt=self.prompt_key)
        return texts if isinstance(texts, list) else pair_with_prompt(row, place, *(texts[name] for name in names))

    def problems(self, known: Known) -> Iterator[Problem]:
        yield from super().problems(known)
        if self.prompt_key in (self.chosen_key, self.rejected_key):
            expected = "different from data.chosen_key and data.rejected_key"
            yield Problem("data.prompt_key", self.prompt_key, expected, "name prompt and answers apart")
