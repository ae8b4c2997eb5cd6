"""`prompt` and any number of `answers`, each with a `score`: one row makes several pairs.

The answers may be in several pairs each; with `data.group_prompts` the prompt and each answer are computed once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal, get_args

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, Row, RowFormat, Text
from megadpo.data.formats.fields import pair_with_prompt, read_fields, some_keys
from megadpo.data.formats.messages import read_text
from megadpo.data.sources import Place
from megadpo.files.jsonl import type_name

AnswerPairs = Literal["all", "best_worst", "adjacent"]
_TEXTS = ("text", "messages")


@dataclass(frozen=True)
class _Answer:
    text: Text
    score: float | None


@FORMATS.add("ScoredAnswers")
@dataclass(frozen=True, kw_only=True)
class ScoredAnswers(RowFormat):
    answer_pairs: AnswerPairs = "all"
    """Which pairs a row's answers make: `all` with different scores, the `best_worst`, or those that are `adjacent` when
    sorted by score. A row's own `pairs` wins."""

    def fields(self) -> tuple[str, ...]:
        return ("prompt", "answers")

    def read(self, row: Row, place: Place) -> tuple[PreferencePair, ...] | list[Problem]:
        texts = read_fields(row, {"prompt": None}, place, prompt="prompt")
        problems = texts if isinstance(texts, list) else []
        answers = list(_answers(row.get("answers"), place, problems))
        if problems or isinstance(texts, list):
            return problems
        named = row.get("pairs")
        chosen = self.answer_pairs if named is None else named
        pairs = (
            _by_score(chosen, answers, place, problems)
            if isinstance(chosen, str)
            else list(_listed(chosen, answers, place, problems))
        )
        found: list[PreferencePair] = []
        for better, worse in pairs:
            pair = pair_with_prompt(row, place, texts["prompt"], answers[better].text, answers[worse].text)
            if isinstance(pair, PreferencePair):
                scores = (answers[one].score for one in (better, worse))
                chosen_score, rejected_score = (math.nan if score is None else float(score) for score in scores)
                found.append(dataclasses.replace(pair, rewards=(chosen_score, rejected_score)))
            elif isinstance(pair, list):
                problems += [problem for problem in pair if problem not in problems]
        return problems or tuple(found)


def _answers(value: Any, place: Place, problems: list[Problem]) -> Iterator[_Answer]:
    """The answers of a row; what is wrong with them goes to `problems`."""
    if not isinstance(value, list) or len(value) < 2:
        got = "1 answer" if isinstance(value, list) and value else "no answers"
        got = got if isinstance(value, list) else f"answers: {type_name(value)}"
        fix = "give the row further answers, or remove it: one answer expresses no preference"
        problems.append(Problem(str(place), got, "a list of at least two answers", fix))
        return
    for number, answer in enumerate(value):
        name = f"answers[{number}]"
        texts = [key for key in _TEXTS if isinstance(answer, Mapping) and answer.get(key) is not None]
        if len(texts) != 1:
            got = f"{name} with the fields {some_keys(answer)}" if isinstance(answer, Mapping) else type_name(answer)
            expected = "an object {text: string, score: number} or {messages: list, score: number}"
            problems.append(Problem(str(place), got, expected, "write each answer in one of these forms"))
            continue
        text, found = read_text(answer[texts[0]], f"{name}.{texts[0]}", place, is_prompt=False)
        problems += found
        score = answer.get("score")
        if score is not None and not _is_number(score):
            got = f"{name} with the score {str(score)[:40]}"
            problems.append(Problem(str(place), got, "a finite number", "correct it; higher is better"))
        elif text is not None:
            yield _Answer(text, score)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond float64
        return False


def _by_score(how: str, answers: Sequence[_Answer], place: Place, problems: list[Problem]) -> list[tuple[int, int]]:
    """The pairs (better, worse) that the scores make, best first. Answers with equal scores make none; of equal scores the
    first answer is the best and the last one the worst."""
    if how not in get_args(AnswerPairs):
        expected = "all, best_worst, adjacent, or a list of [chosen, rejected] such as [[0, 1]]"
        problems.append(Problem(str(place), f"pairs: {how!r}", expected, "write one of these, or leave it out"))
        return []
    unscored = [number for number, answer in enumerate(answers) if answer.score is None]
    if unscored:
        fix = "give each answer a score, or list the pairs: [[chosen, rejected], ...]"
        problems.append(Problem(str(place), f"answers[{unscored[0]}] without a score", f"scores for pairs: {how}", fix))
        return []
    scores = [answer.score or 0.0 for answer in answers]
    ranked = sorted(range(len(answers)), key=lambda number: -scores[number])  # stable
    if scores[ranked[0]] == scores[ranked[-1]]:
        fix = "remove the row: equal scores express no preference"
        problems.append(Problem(str(place), f"{len(answers)} answers of score {scores[0]:g}", "different scores", fix))
        return []
    first: dict[str, int] = {}
    for number, answer in enumerate(answers):
        same = first.setdefault(repr(answer.text), number)
        if scores[same] != scores[number]:
            got = (
                f"answers[{same}] and answers[{number}] equal, with the scores {scores[same]:g} and {scores[number]:g}"
            )
            problems.append(Problem(str(place), got, "one score for each answer", "keep one of the two"))
    if how == "best_worst":
        return [(ranked[0], ranked[-1])]
    pairs = combinations(ranked, 2) if how == "all" else pairwise(ranked)
    return [(better, worse) for better, worse in pairs if scores[better] > scores[worse]]


def _listed(pairs: Any, answers: Sequence[_Answer], place: Place, problems: list[Problem]) -> Iterator[tuple[int, int]]:
    """The pairs of a row's own list of [chosen, rejected]."""
    if not isinstance(pairs, list) or not pairs:
        got = "no pairs" if isinstance(pairs, list) else f"pairs: {type_name(pairs)}"
        expected = "all, best_worst, adjacent, or a list of [chosen, rejected] such as [[0, 1]]"
        problems.append(Problem(str(place), got, expected, "write one of these, or leave it out"))
        return
    for number, pair in enumerate(pairs):
        name = f"pairs[{number}]"
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(one) is int for one in pair)):
            expected, fix = "[chosen, rejected], two numbers of answers from 0", "write each pair in this form"
            problems.append(Problem(str(place), f"{name}: {pair!r}", expected, fix))
            continue
        outside = [one for one in pair if not 0 <= one < len(answers)]
        if outside:
            fix = f"correct it: the row has {len(answers)} answers"
            problems.append(Problem(str(place), f"{name}: {pair}", f"numbers from 0 to {len(answers) - 1}", fix))
            continue
        better, worse = pair
        scores = answers[better].score, answers[worse].score
        if scores[0] is not None and scores[1] is not None and scores[0] <= scores[1]:
            got = f"{name}: {pair}, with the scores {scores[0]:g} and {scores[1]:g}"
            fix = "turn the pair round or remove it, or remove the scores"
            problems.append(Problem(str(place), got, "a chosen answer of a higher score", fix))
            continue
        yield better, worse
