"""`context` and two `completions`, each with a `rank`, as in NeMo RL's PreferenceDataset. The lower rank is preferred."""

from __future__ import annotations

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, Row, RowFormat, Text
from megadpo.data.formats.fields import missing_field, pair_with_prompt, some_keys
from megadpo.data.formats.messages import read_text
from megadpo.data.sources import Place
from megadpo.files.jsonl import type_name

_FIELDS = ("context", "completions")


@FORMATS.add("PreferenceDataset")
class Ranked(RowFormat):
    def fields(self) -> tuple[str, ...]:
        return _FIELDS

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        missing = [missing_field(row, key, _FIELDS, None, place) for key in _FIELDS if key not in row]
        if missing:
            return missing
        context, problems = read_text(row["context"], "context", place, is_prompt=True)
        completions = row["completions"]
        if not isinstance(completions, list) or len(completions) != 2:
            got = f"{len(completions)} completions" if isinstance(completions, list) else type_name(completions)
            fix = "keep the best and the worst, or write one row for each pair of completions"
            return [*problems, Problem(str(place), f"completions: {got}", "a list of exactly two completions", fix)]
        ranked: list[tuple[int, Text]] = []
        for number, completion in enumerate(completions):
            name = f"completions[{number}]"
            rank = completion.get("rank") if isinstance(completion, dict) else None
            if not isinstance(completion, dict) or type(rank) is not int or "completion" not in completion:
                expected = "an object {rank: whole number, completion: messages}"
                got = f"{name} of type {type_name(completion)}"
                if isinstance(completion, dict):
                    got = f"{name} with rank {rank!r} and the fields {some_keys(completion)}"
                fix = "write each completion in this form; the lower rank is preferred"
                problems.append(Problem(str(place), got, expected, fix))
                continue
            answer, found = read_text(completion["completion"], f"{name}.completion", place, is_prompt=False)
            problems += found
            if answer is not None:
                ranked.append((rank, answer))
        if problems or context is None:
            return problems
        if ranked[0][0] == ranked[1][0]:
            fix = "remove the row: equal ranks express no preference"
            return [Problem(str(place), f"two completions of rank {ranked[0][0]}", "two different ranks", fix)]
        (_, chosen), (_, rejected) = sorted(ranked, key=lambda one: one[0])
        return pair_with_prompt(row, place, context, chosen, rejected)
