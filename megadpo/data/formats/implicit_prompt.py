"""Two full conversations, or two transcripts of Human and Assistant turns. Their common beginning is the prompt."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair, Row
from megadpo.data.formats.fields import (
    AnswerKeys,
    make_pair,
    not_shared,
    pair_of_conversations,
    shared_turns,
)
from megadpo.data.formats.transcript import ASSISTANT, turns_of
from megadpo.data.sources import Place


def _transcripts(row: Row, place: Place, chosen: str, rejected: str) -> PreferencePair | list[Problem]:
    chosen_turns, rejected_turns = turns_of(chosen), turns_of(rejected)
    problems = []
    for name, turns in (("chosen", chosen_turns), ("rejected", rejected_turns)):
        if not turns:
            got = f"no field 'prompt', and a {name} text that does not begin with a turn such as 'Human:'"
            expected = "a prompt, or two transcripts of turns that begin with a blank line and 'Human:' or 'Assistant:'"
            fix = "add the prompt's field (data.prompt_key is its name), or begin the transcript's turns like this"
            problems.append(Problem(str(place), got, expected, fix))
        elif turns[-1].role != "assistant" or not turns[-1].words.strip():
            problem = "without an answer at its end" if turns[-1].words.strip() else "empty at its end"
            expected, fix = "a transcript that ends with the assistant's text", "remove what follows it, or the row"
            problems.append(Problem(str(place), f"a {name} transcript {problem}", expected, fix))
    if problems:
        return problems
    shared = shared_turns(tuple(chosen_turns), tuple(rejected_turns))
    if chosen != rejected and "user" not in [turn.role for turn in chosen_turns[:shared]]:
        return [not_shared(place)]
    prompt = "".join(turn.text for turn in chosen_turns[:shared])
    if chosen[len(prompt) :].startswith(ASSISTANT) and rejected[len(prompt) :].startswith(ASSISTANT):
        prompt += ASSISTANT
    start = len(prompt)
    return make_pair(row, place, prompt, chosen[start:], rejected[start:], is_transcript=True)


@FORMATS.add("ImplicitPrompt")
@dataclass(frozen=True, kw_only=True)
class ImplicitPrompt(AnswerKeys):
    is_last = True

    def fields(self) -> tuple[str, ...]:
        return (self.chosen_key, self.rejected_key)

    def read(self, row: Row, place: Place) -> PreferencePair | list[Problem]:
        chosen, rejected, problems = self.answers(row, place)
        if isinstance(chosen, tuple) and isinstance(rejected, tuple):
            return pair_of_conversations(row, place, chosen, rejected)
        if isinstance(chosen, str) and isinstance(rejected, str):
            return _transcripts(row, place, chosen, rejected)
        fix = "write both answers in the same form"
        got = "one answer as a string, the other as messages"
        return problems or [Problem(str(place), got, "two of the same form", fix)]
