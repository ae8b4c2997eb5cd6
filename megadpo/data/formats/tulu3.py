"""Two full conversations, as in Tülu 3's preference mixture. Other fields, such as `prompt`, are not read.
Two other formats recognise the same rows, so the config must name this one."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.data.formats import FieldKeys, HubDataset, PreferencePair, Row, RowFormat, register
from megadpo.data.formats.fields import pair_of_conversations, read_answers
from megadpo.data.sources import Place


def _read(row: Row, keys: FieldKeys, place: Place) -> PreferencePair | list[Problem]:
    chosen, rejected, problems = read_answers(row, keys, place)
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        return pair_of_conversations(row, place, chosen, rejected)
    fix = "write both answers as lists of messages, or leave data.dataset_name out"
    return problems or [Problem(str(place), "answers as strings", "two lists of messages that include the prompt", fix)]


register(
    RowFormat(
        name="Tulu3Preference",
        read=_read,
        fields=lambda keys: (),
        keys=("chosen_key", "rejected_key"),
        hub=HubDataset("allenai/llama-3.1-tulu-3-8b-preference-mixture"),
    )
)
