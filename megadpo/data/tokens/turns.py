"""Which parts of an answer are in the loss (`data.loss_on`), as pieces of its text.

last_turn: the assistant's last turn, as NeMo RL. differing_turns: every assistant turn but those that the other answer
has too, at the same place. Turns of users and tools, and what a template writes between turns, are never in the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from megadpo.data.formats import Message, PreferencePair, Text
from megadpo.data.formats.transcript import ASSISTANT, messages_of, turns_of

LossOn = Literal["last_turn", "differing_turns"]

Render = Callable[[list[Message], bool], str]
"""(messages, open for the assistant's answer) -> text."""


class TurnPiece(NamedTuple):
    """A stretch of an answer's text."""

    text: str
    in_loss: bool


class RewrittenError(Exception):
    """A template that writes something differently once more follows, so that no line can be drawn after it."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def opens_answer(pair: PreferencePair) -> bool:
    """Whether both answers begin with the assistant's words, so that the prompt ends by asking for them. They do not
    where two conversations part at a user's turn."""
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
    """The pieces of an answer in plain text: one, unless it is a transcript of several turns."""
    if not pair.is_transcript:
        return [TurnPiece(answer, True)]
    inside = opens_answer(pair)
    turns, others = (turns_of(text, inside_assistant=inside) for text in (answer, other))
    counted = _counted(turns, others, [turn.role for turn in turns], loss_on)
    pieces: list[TurnPiece] = []
    for turn, in_loss in zip(turns, counted, strict=True):
        if in_loss:
            pieces += [TurnPiece(turn.opening, False), TurnPiece(turn.said, True)]
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
    """The pieces of an answer as the chat template writes it after the text `opened` of its prompt.

    A turn in the loss begins where the template, asked for an answer to what stands before, stops; it ends with what
    the template writes after it. Raises RewrittenError where these are not what the whole text has there."""
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
        # a turn of the assistant right after another: what opens it can't be told from the end of the other's
        first = max(len(start), position)
        pieces += [TurnPiece(whole[position:first], False), TurnPiece(whole[first : len(end)], True)]
        position = len(end)
    pieces.append(TurnPiece(whole[position:], False))
    return _joined(pieces)


def _counted(turns: Sequence[Any], others: Sequence[Any], roles: list[str], loss_on: LossOn) -> list[bool]:
    """For each turn whether it is in the loss."""
    if loss_on == "last_turn":
        return [number == len(turns) - 1 for number in range(len(turns))]
    return [
        role == "assistant" and not (number < len(others) and others[number] == turn)
        for number, (role, turn) in enumerate(zip(roles, turns, strict=True))
    ]


def _joined(pieces: list[TurnPiece]) -> list[TurnPiece]:
    """The same text in as few pieces as it can be: neighbours alike joined, empty ones left out."""
    joined: list[TurnPiece] = []
    for piece in pieces:
        if joined and joined[-1].in_loss == piece.in_loss:
            joined[-1] = TurnPiece(joined[-1].text + piece.text, piece.in_loss)
        elif piece.text:
            joined.append(piece)
    return joined
