"""Two full conversations, as in Tülu 3's preference mixture. Other fields, such as `prompt`, are not read.
Two other formats recognise the same rows, so the config must name this one."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import HubDataset, PreferencePair, Row
from megadpo.data.formats.fields import AnswerKeys, pair_of_conversations
from megadpo.data.sources import Place


@FORMATS.add("Tulu3Preference")
@dataclass(frozen=True, kw_only=True)
class Tulu3(AnswerKeys):
    hub = HubDataset("allenai/llama-3.1-tulu-3-8b-preference-mixture")

    def fields(self) -> tuple[str, ...]:
        return ()

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        chosen, rejected, problems = self.answers(row, place)
        if isinstance(chosen, tuple) and isinstance(rejected, tuple):
            return pair_of_conversations(row, place, chosen, rejected)
        fix = "write both answers as lists of messages, or leave data.dataset_name out"
        return problems or [
            Problem(str(place), "answers as strings", "two lists of messages that include the prompt", fix)
        ]
