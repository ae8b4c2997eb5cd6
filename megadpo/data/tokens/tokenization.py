"""PreferencePairs -> token ids of prompt and answers.

Plain text, as in TRL's DPOTrainer: the prompt is ids(prompt); the answer is the rest of ids(prompt + answer + EOS).
With a chat template: the prompt is ids(template(prompt) with a generation prompt); the answer is the rest of
ids(template(prompt + answer)).
If ids(prompt) is not a prefix of the whole (one token would span both), the prompt keeps its ids, the answer is tokenised
alone, and the report counts the pair. (TRL 1.16 shortens the prompt instead, so that the model sees another prompt
than at inference.)

An answer of several turns is split into pieces, each in the loss or not (turns.py). The split is found in the same way: by
the ids of the text before it, or, if these are not a prefix, by tokenising each piece alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from megadpo.config.bounded import OverLimit, bounded
from megadpo.config.problems import ConfigError, DataError, Problem
from megadpo.data.formats import Message, PreferencePair
from megadpo.data.formats.read_pairs import OnBadRow
from megadpo.data.pairs import LossMask, TokenIds, TokenizedPair
from megadpo.data.sources import MOST_PROBLEMS
from megadpo.data.tokens.chunk import Chunk
from megadpo.data.tokens.tokenizer import OWN_TEMPLATE, require_eos, resolve_chat_template, template_variables
from megadpo.data.tokens.turns import (
    LossOn,
    RewrittenError,
    TurnPiece,
    answer_messages,
    chat_pieces,
    opens_answer,
    plain_pieces,
    prompt_messages,
)
from megadpo.files.jsonl import MAX_LINE_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_PAIRS = 128  # pairs per tokenizer call: enough for its threads; it needs 70 kB for each pair
_RESERVED_KWARGS = ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "conversation")
_NO_TEMPLATE = "there is no chat template"


@dataclass
class _Texts:
    """The texts of a pair for the tokenizer: the prompt, and the pieces of each answer after it."""

    pair: PreferencePair
    prompt: str
    answers: tuple[list[TurnPiece], list[TurnPiece]]


class PairTokenizer:
    """Makes token ids of pairs. Its constructor raises ConfigError for a tokenizer without EOS, an unusable chat template
    or chat_template_kwargs that can't be set; `encode` raises DataError for a template that takes too much time, memory
    or text for a pair."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = OWN_TEMPLATE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        loss_on: LossOn = "last_turn",
        media_tokens: tuple[int, ...] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = require_eos(tokenizer)
        self.chat_template = resolve_chat_template(tokenizer, chat_template)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.loss_on = loss_on
        self.media_tokens = media_tokens
        variables = frozenset() if self.chat_template is None else template_variables(self.chat_template)
        self._reads_tools = "tools" in variables
        self._check_kwargs(variables)
        added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token))
        self._only_special = re.compile("(?:" + "|".join([*map(re.escape, special), r"\s"]) + ")*")
        # Some tokenizers add EOS to every text; it must not end the prompt
        self._suffix_tokens = 0 if self.chat_template is not None else _suffix_tokens(tokenizer)

    def encode(self, pairs: Sequence[PreferencePair], *, on_bad_row: OnBadRow = "refuse") -> Chunk:
        """Token ids of all pairs, of any length, and the problems of those that can't be tokenised. With on_bad_row
        "refuse" it stops after MOST_PROBLEMS problems."""
        chunk = Chunk(places=[pair.place for pair in pairs])
        made: list[TokenizedPair] = []
        for start in range(0, len(pairs), _BATCH_PAIRS):
            read = [self._texts(pair) for pair in pairs[start : start + _BATCH_PAIRS]]
            problems = [one for one in read if isinstance(one, Problem)]
            for one in self._encode_batch([one for one in read if isinstance(one, _Texts)], chunk.counts):
                if isinstance(one, Problem):
                    problems.append(one)
                else:
                    made.append(one)
            chunk.counts["dropped_bad_rows"] += len(problems)
            chunk.problems += problems[: MOST_PROBLEMS - len(chunk.problems)]
            if on_bad_row == "refuse" and len(chunk.problems) >= MOST_PROBLEMS:
                break
        chunk.pairs = made
        return chunk

    # Text

    def _texts(self, pair: PreferencePair) -> _Texts | Problem:
        if pair.tools and not self._reads_tools:
            return Problem(
                where=str(pair.place),
                value="field 'tools'",
                expected="no tools, since " + ("the chat template reads none" if self.chat_template else _NO_TEMPLATE),
                fix="remove the field, or set policy.tokenizer.chat_template to one that reads tools",
            )
        made = self._plain_texts(pair) if self.chat_template is None else self._chat_texts(pair)
        if isinstance(made, _Texts):
            for name, pieces in zip(("chosen", "rejected"), made.answers, strict=True):
                if not any(piece.in_loss for piece in pieces):
                    return _nothing_in_loss(pair, name, self.loss_on)
        return made

    def _chat_texts(self, pair: PreferencePair) -> _Texts | Problem:
        prompt = prompt_messages(pair)
        answers = [answer_messages(pair, answer) for answer in (pair.chosen, pair.rejected)]
        for name, messages in zip(("chosen", "rejected"), answers, strict=True):
            if self._says_nothing(messages[-1]):
                return _only_special_tokens(pair, name)

        def render(messages: list[Message], open_for_answer: bool) -> str:
            return self._render(pair, messages, open_for_answer=open_for_answer)

        try:
            with bounded():
                opened = render(prompt, opens_answer(pair))
                pieces = [
                    chat_pieces(render, prompt, opened, messages, other, self.loss_on)
                    for messages, other in (answers, answers[::-1])
                ]
        except RewrittenError as error:
            return _rewritten(pair, error)
        except OverLimit as error:  # not left out as a bad row: the next may cost as much
            raise DataError(_over_limit(pair, error)) from error
        except Exception as error:  # a template may raise any exception
            return _refused_by_template(pair, error)
        return _Texts(pair, opened, (pieces[0], pieces[1]))

    def _plain_texts(self, pair: PreferencePair) -> _Texts | Problem:
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
            return Problem(
                where=str(pair.place),
                value="messages, but no chat template",
                expected="plain strings, or a tokenizer with a chat template",
                fix="set policy.tokenizer.chat_template, use an instruct model's tokenizer, or write strings",
            )
        eos = str(self.tokenizer.eos_token)
        answers = []
        for name, answer, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
            pieces = plain_pieces(pair, answer, other, self.loss_on)
            if self._only_special.fullmatch(pieces[-1].text):
                return _only_special_tokens(pair, name)
            last = pieces[-1]
            answers.append([*pieces[:-1], TurnPiece(last.text.removesuffix(eos) + eos, last.in_loss)])
        return _Texts(pair, prompt, (answers[0], answers[1]))

    def _says_nothing(self, message: Message) -> bool:
        """Whether an answer has only special tokens and white space, and calls no tool."""
        text = str(message.get("content", "")) + str(message.get("reasoning_content", ""))
        return not message.get("tool_calls") and self._only_special.fullmatch(text) is not None

    def _render(self, pair: PreferencePair, messages: list[Message], *, open_for_answer: bool) -> str:
        """The text of the conversation. Raises what the template raises."""
        rendered = self.tokenizer.apply_chat_template(
            cast(Any, messages),
            tools=cast(Any, None if pair.tools is None else list(pair.tools)),
            tokenize=False,
            add_generation_prompt=open_for_answer,
            chat_template=self.chat_template,
            **self.chat_template_kwargs,
        )
        if len(rendered) > MAX_LINE_BYTES:
            raise OverLimit(f"it writes more than {MAX_LINE_BYTES // 2**20} MiB")
        return cast(str, rendered)

    # Ids

    def _encode_batch(self, texts: list[_Texts], counts: Counter[str]) -> Iterator[TokenizedPair | Problem]:
        """The ids of each pair, or what is wrong with them. Counts the pairs for which an answer was tokenised alone."""
        if not texts:
            return
        rows = [text.prompt for text in texts]
        for number in (0, 1):
            rows += [text.prompt + "".join(piece.text for piece in text.answers[number]) for text in texts]
        distinct = list(dict.fromkeys(rows))  # answers in several pairs are tokenised once
        ids = dict(zip(distinct, self._ids(distinct, special_tokens=self.chat_template is None), strict=True))
        count = len(texts)
        for number, text in enumerate(texts):
            prompt = ids[text.prompt]
            chosen, chosen_mask, chosen_apart = self._answer(text, 0, prompt, ids[rows[count + number]])
            rejected, rejected_mask, rejected_apart = self._answer(text, 1, prompt, ids[rows[2 * count + number]])
            masks, read = (chosen_mask, rejected_mask), text.pair
            pair = TokenizedPair(read.place.row, prompt, chosen, rejected, *masks, read.weight, read.rewards)
            problem = _token_problem(read, pair) or self._media_problem(read, pair)
            counts["tokenized_apart"] += problem is None and (chosen_apart or rejected_apart)
            yield problem or pair

    def _answer(
        self, text: _Texts, number: int, prompt: TokenIds, whole: TokenIds
    ) -> tuple[TokenIds, LossMask | None, bool]:
        """The answer's ids, which of them are in the loss (None: all), and whether its pieces were tokenised alone."""
        pieces = text.answers[number]
        before = [prompt]
        if len(pieces) > 1:
            ends = list(accumulate((piece.text for piece in pieces), initial=text.prompt))
            before += self._ids(ends[1:-1], special_tokens=self.chat_template is None)
        apart = not all(_is_prefix(ids, whole) for ids in before)
        if apart:
            parts = self._ids([piece.text for piece in pieces], special_tokens=False)
            ids = np.concatenate(parts)
            lengths = [len(part) for part in parts]
        else:
            ids = whole[len(prompt) :]
            lengths = np.diff([*(len(part) for part in before), len(whole)]).tolist()
        if self.chat_template is None and (len(ids) == 0 or ids[-1] != self.eos_token_id):
            ids = np.append(ids, np.int32(self.eos_token_id))  # the tokenizer did not recognise the text of EOS
            lengths[-1] += 1
        if all(piece.in_loss for piece in pieces):
            return ids, None, apart
        return ids, np.repeat(np.array([piece.in_loss for piece in pieces]), lengths), apart

    def _media_problem(self, pair: PreferencePair, tokenized: TokenizedPair) -> Problem | None:
        """The error for a text with the token of an image or a video: the text model can't compute it."""
        if not self.media_tokens:
            return None
        ids = np.concatenate([tokenized.prompt_ids, tokenized.chosen_ids, tokenized.rejected_ids])
        found = ids[np.isin(ids, self.media_tokens)]
        if len(found) == 0:
            return None
        return Problem(
            where=str(pair.place),
            value=f"the token {self.tokenizer.convert_ids_to_tokens(int(found[0]))!r}, which stands for an image or video",
            expected="text alone: this model's text part is trained",
            fix="remove the row, or the token from its texts",
        )

    def _ids(self, texts: list[str], *, special_tokens: bool) -> list[TokenIds]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning for a text over model_max_length: on_too_long decides
        )["input_ids"]
        suffix = self._suffix_tokens if special_tokens else 0
        return [np.array(ids[: len(ids) - suffix], dtype=np.int32) for ids in encoded]

    def _check_kwargs(self, variables: frozenset[str]) -> None:
        """Refuses kwargs by which prompt and answer are separated, and those that the template doesn't read."""
        problems = []
        for name, value in self.chat_template_kwargs.items():
            expected, fix = "a variable of the template", "correct the name, or remove it"
            if name in _RESERVED_KWARGS:
                fix = "remove it: it is used to separate prompt and answer"
            elif self.chat_template is None:
                expected, fix = f"none, since {_NO_TEMPLATE}", "remove it, or set policy.tokenizer.chat_template"
            elif name in variables:
                continue
            problems.append(Problem(f"policy.tokenizer.chat_template_kwargs.{name}", value, expected, fix))
        if problems:
            raise ConfigError(problems)


def _is_prefix(ids: TokenIds, whole: TokenIds) -> bool:
    return np.array_equal(whole[: len(ids)], ids)


def _suffix_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens (EOS, usually) the tokenizer appends to every text."""
    with_special = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    without = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(with_special) - len(without) + 1):
        if with_special[start : start + len(without)] == without:
            return len(with_special) - start - len(without)
    return 0


def _token_problem(pair: PreferencePair, tokenized: TokenizedPair) -> Problem | None:
    if tokenized.prompt_tokens == 0:
        return Problem(
            where=str(pair.place),
            value="a prompt without tokens",
            expected="at least one token before the answers: it predicts their first token",
            fix="give the pair a prompt, or use a tokenizer that begins a text with BOS",
        )
    for name, tokens in (("chosen", tokenized.chosen_tokens), ("rejected", tokenized.rejected_tokens)):
        if tokens == 0:
            return Problem(
                where=str(pair.place),
                value=f"a {name} answer without tokens after the chat template",
                expected="a template that writes the answer after the prompt",
                fix="correct policy.tokenizer.chat_template",
            )
    if np.array_equal(tokenized.chosen_ids, tokenized.rejected_ids):
        return Problem(
            where=str(pair.place),
            value="answers that differ as text, but not as tokens",
            expected="two different answers",
            fix="remove the row: its answers differ only in text that tokenizer or chat template drop (white space?)",
        )
    for name, mask in (("chosen", tokenized.chosen_mask), ("rejected", tokenized.rejected_mask)):
        if mask is not None and not mask.any():
            return Problem(
                where=str(pair.place),
                value=f"a {name} answer without tokens in the loss",
                expected="at least one, in an assistant turn that data.loss_on names",
                fix="remove the row, or set data.loss_on: last_turn",
            )
    return None


def _rewritten(pair: PreferencePair, error: RewrittenError) -> Problem:
    return Problem(
        where=str(pair.place),
        value=f"a chat template that writes {error.what} differently if more messages follow",
        expected="a template whose text for the first messages does not depend on those that follow, as at inference",
        fix="set policy.tokenizer.chat_template_kwargs (such as enable_thinking) or another chat_template"
        + ("" if error.what == "the prompt" else ", or set data.loss_on: last_turn"),
    )


def _nothing_in_loss(pair: PreferencePair, name: str, loss_on: LossOn) -> Problem:
    return Problem(
        where=str(pair.place),
        value=f"a {name} answer without anything in the loss with data.loss_on {loss_on}",
        expected="an assistant turn that differs from the other answer's, written by the chat template",
        fix="set data.loss_on: last_turn, or correct policy.tokenizer.chat_template, or remove the row",
    )


def _only_special_tokens(pair: PreferencePair, name: str) -> Problem:
    return Problem(
        where=str(pair.place),
        value=f"a {name} answer of only special tokens",
        expected="an answer with text",
        fix="give the pair an answer, or remove the row",
    )


def _over_limit(pair: PreferencePair, error: OverLimit) -> Problem:
    return Problem(
        where=str(pair.place),
        value=f"a chat template that is not done: {error}",
        expected="a text after milliseconds",
        fix="set policy.tokenizer.chat_template to one without such loops and repetitions, or remove the row",
    )


def _refused_by_template(pair: PreferencePair, error: Exception) -> Problem:
    return Problem(
        where=str(pair.place),
        value=f"messages that the chat template refuses: {error}",
        expected="roles and an order of turns that the template accepts",
        fix="change the row's messages, or set policy.tokenizer.chat_template",
    )
