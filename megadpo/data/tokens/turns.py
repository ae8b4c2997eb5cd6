"""Splits an answer into pieces that are in the loss or not (`data.loss_on`).

last_turn: the assistant's last turn is in the loss, as in NeMo RL. differing_turns: every assistant turn, except those
that the other answer also has at the same place. Turns of users and tools, and a template's text between turns, are never
in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from megadpo.data.formats import Message, PreferencePair, Text
from megadpo.data.formats.transcript import ASSISTANT, messages_of, turns_of

LossOn = Literal["last_turn", "differing_turns"]

Render = Callable[[list[Message], bool], str]
"""(messages, whether to add a generation prompt) -> text."""


class TurnPiece(NamedTuple):
    """A part of an answer's text."""

    text: str
    in_loss: bool


class RewrittenError(Exception):
    """The template writes `what` differently if more messages follow, so the end of `what` can't be found."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def opens_answer(pair: PreferencePair) -> bool:
    """Whether both answers begin with the assistant's text, so that the prompt needs a generation prompt. False if two
    conversations begin to differ at a user's turn."""
    if pair.is_transcript:
        return str(pair.prompt).endswith(ASSISTANT)
    return all(isinstance(text, str) or text[0]["role"] == "assistant" for text in (pair.chosen, pair.rejected))


def prompt_messages(pair: PreferencePair) -> list[Message]:
    """The prompt as chat messages; a plain string is the user's."""
    if isinstance(pair.prompt, str):
        return messages_of(pair.prompt) if pair.is_transcript else [{"role": "user", "content": pair.prompt}]
    return list(pair.prompt)


def answer_messages(pair: PreferencePair, answer: Text) -> list[Message]:
    """An answer of the pair as chat messages; a plain string is the assistant's."""
    if isinstance(answer, str):
        if pair.is_transcript:
            return messages_of(answer, inside_assistant=opens_answer(pair))
        return [{"role": "assistant", "content": answer}]
    return list(answer)


def plain_pieces(pair: PreferencePair, answer: str, other: str, loss_on: LossOn) -> list[TurnPiece]:
    """The pieces of a plain-text answer. Only a transcript of several turns has more than one."""
    if not pair.is_transcript:
        return [TurnPiece(answer, True)]
    inside = opens_answer(pair)
    turns, others = (turns_of(text, inside_assistant=inside) for text in (answer, other))
    counted = _counted(turns, others, [turn.role for turn in turns], loss_on)
    pieces: list[TurnPiece] = []
    for turn, in_loss in zip(turns, counted, strict=True):
        if in_loss:
            pieces += [TurnPiece(turn.opening, False), TurnPiece(turn.words, True)]
        else:
            pieces.append(TurnPiece(turn.text, False))
    return _joined(pieces)


def chat_pieces(
    render: Render,
    prompt: list[Message],
    opened: str,
    answer: list[Message],
    other: list[Message],
    loss_on: LossOn,
) -> list[TurnPiece]:
    """The pieces of an answer, in the chat template's text after the prompt. `opened`: the prompt with generation prompt.

    A turn in the loss begins after the generation prompt for the messages before it, and ends with the template's text
    after it. Raises RewrittenError if the text of the whole conversation differs there."""
    whole = render(prompt + answer, False)
    if not whole.startswith(opened):
        raise RewrittenError("the prompt")
    counted = _counted(answer, other, [str(message["role"]) for message in answer], loss_on)
    if len(answer) == 1:
        return [TurnPiece(whole[len(opened) :], counted[0])]
    pieces: list[TurnPiece] = []
    position = len(opened)
    for number, in_loss in enumerate(counted):
        if not in_loss:
            continue
        start = opened if number == 0 and answer[0]["role"] == "assistant" else render(prompt + answer[:number], True)
        is_last = number == len(answer) - 1
        end = whole if is_last else render(prompt + answer[: number + 1], False)
        if not (whole.startswith(start) and whole.startswith(end)):
            raise RewrittenError(f"the first {len(prompt) + number + 1} messages")
        # if one assistant turn follows another, the first one's end may include the second one's opening
        first = max(len(start), position)
        pieces += [TurnPiece(whole[position:first], False), TurnPiece(whole[first : len(end)], True)]
        position = len(end)
    pieces.append(TurnPiece(whole[position:], False))
    return _joined(pieces)


def _counted(turns: Sequence[Any], others: Sequence[Any], roles: list[str], loss_on: LossOn) -> list[bool]:
    """Whether each turn is in the loss."""
    if loss_on == "last_turn":
        return [number == len(turns) - 1 for number in range(len(turns))]
    return [
        role == "assistant" and not (number < len(others) and others[number] == turn)
        for number, (role, turn) in enumerate(zip(roles, turns, strict=True))
    ]


def _joined(pieces: list[TurnPiece]) -> list[TurnPiece]:
    """Joins neighbouring pieces of the same kind, and removes empty pieces."""
    joined: list[TurnPiece] = []
    for piece in pieces:
        if joined and joined[-1].in_loss == piece.in_loss:
            joined[-1] = TurnPiece(joined[-1].text + piece.text, piece.in_loss)
        elif piece.text:
            joined.append(piece)
    return joined
