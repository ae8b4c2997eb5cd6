"""PreferencePairs -> token ids: where the prompt ends, and what the answer is.

Plain text, as TRL's DPOTrainer: ids(prompt), then what ids(prompt + answer + EOS) adds after them.
With a chat template: ids(template(prompt), open for the assistant), then what ids(template(prompt + answer)) adds.
In both, where ids(prompt) is not a prefix (characters on both sides of the line merge to one token), the prompt keeps
its ids, the answer is tokenised apart, and the pair is counted in the report. (TRL 1.16 moves the line to the left
there, so that the model no longer sees the prompt as it will at inference.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from megadpo.config.problems import ConfigError, DataError, Problem
from megadpo.data.pairs import Message, PreferencePair, TokenIds, TokenizedPair
from megadpo.data.reader import MOST_PROBLEMS
from megadpo.data.tokenizer import OWN_TEMPLATE, require_eos, resolve_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_PAIRS = 1024  # pairs per tokenizer call: enough for its threads, small enough for memory
_RESERVED_KWARGS = ("tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "conversation")


@dataclass
class _Texts:
    """A pair as the tokenizer gets it: the prompt, and each answer as what follows the prompt."""

    pair: PreferencePair
    prompt: str
    answers: tuple[str, str]


@dataclass
class Tokenized:
    """Pairs in the order given, and how they came about."""

    pairs: list[TokenizedPair] = field(default_factory=list)
    tokenized_apart: int = 0
    """Pairs with an answer whose first characters merge with the prompt's last."""


class PairTokenizer:
    """Turns pairs to token ids. Raises ConfigError at once for a tokenizer without EOS, an unusable chat template or
    chat_template_kwargs that are not the user's to set."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = OWN_TEMPLATE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = require_eos(tokenizer)
        self.chat_template = resolve_chat_template(tokenizer, chat_template)
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._check_kwargs()
        # Some tokenizers end every text with EOS of their own accord; that is no end of the prompt
        self._suffix_tokens = 0 if self.chat_template is not None else _suffix_tokens(tokenizer)

    def encode(self, pairs: Sequence[PreferencePair]) -> Tokenized:
        """Token ids of all pairs, none cut. Raises DataError with up to MOST_PROBLEMS problems by file:line."""
        done = Tokenized()
        problems: list[Problem] = []
        for start in range(0, len(pairs), _BATCH_PAIRS):
            texts = []
            for made in self._texts(pairs[start : start + _BATCH_PAIRS]):
                if isinstance(made, Problem):
                    problems.append(made)
                else:
                    texts.append(made)
            problems.extend(self._encode_batch(texts, done))
            if len(problems) >= MOST_PROBLEMS:
                break
        if problems:
            raise DataError(problems[:MOST_PROBLEMS])
        return done

    # Text

    def _texts(self, pairs: Sequence[PreferencePair]) -> Iterator[_Texts | Problem]:
        if self.chat_template is None:
            for pair in pairs:
                yield self._plain_texts(pair)
            return
        prompts = [_as_messages(pair.prompt, "user") for pair in pairs]
        opened = self._render(pairs, prompts, open_for_answer=True)
        answered = []
        for name in ("chosen", "rejected"):
            answers = [_as_messages(getattr(pair, name), "assistant") for pair in pairs]
            whole = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
            answered.append(self._render(pairs, whole, open_for_answer=False))
        for pair, prompt, chosen, rejected in zip(pairs, opened, *answered, strict=True):
            broken = next((text for text in (prompt, chosen, rejected) if isinstance(text, Problem)), None)
            if broken is not None:
                yield broken
            elif not (chosen.startswith(prompt) and rejected.startswith(prompt)):
                yield _rewritten_prompt(pair)
            else:
                yield _Texts(pair, prompt, (chosen[len(prompt) :], rejected[len(prompt) :]))

    def _plain_texts(self, pair: PreferencePair) -> _Texts | Problem:
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
            return Problem(
                where=pair.source,
                value="messages, and no chat template",
                expected="plain strings, or a tokenizer with a chat template",
                fix="set policy.tokenizer.chat_template, use an instruct model's tokenizer, or write strings",
            )
        eos = str(self.tokenizer.eos_token)
        return _Texts(pair, prompt, (chosen.removesuffix(eos) + eos, rejected.removesuffix(eos) + eos))

    def _render(
        self, pairs: Sequence[PreferencePair], conversations: list[list[Message]], *, open_for_answer: bool
    ) -> list[Any]:
        """Each conversation through the template: a text, or the Problem that the template has with it."""

        def apply(some: list[list[Message]]) -> list[str]:
            rendered = self.tokenizer.apply_chat_template(
                cast(Any, some),
                tokenize=False,
                add_generation_prompt=open_for_answer,
                chat_template=self.chat_template,
                **self.chat_template_kwargs,
            )
            return cast(list[str], rendered)

        try:
            return apply(conversations)
        except Exception:  # a template may raise anything; one by one, to know whose conversation it was
            rendered: list[Any] = []
            for pair, conversation in zip(pairs, conversations, strict=True):
                try:
                    rendered.extend(apply([conversation]))
                except Exception as error:
                    rendered.append(_refused_by_template(pair, error))
            return rendered

    # Ids

    def _encode_batch(self, texts: list[_Texts], done: Tokenized) -> list[Problem]:
        """Appends the pairs of `texts` to `done`; returns the problems of those that can't be."""
        if not texts:
            return []
        rows = [text.prompt for text in texts]
        for number in (0, 1):
            rows += [text.prompt + text.answers[number] for text in texts]
        ids = self._ids(rows, special_tokens=self.chat_template is None)
        problems = []
        count = len(texts)
        for number, text in enumerate(texts):
            prompt = ids[number]
            chosen, chosen_apart = self._answer(text.answers[0], prompt, ids[count + number])
            rejected, rejected_apart = self._answer(text.answers[1], prompt, ids[2 * count + number])
            tokenized = TokenizedPair(text.pair.row, prompt, chosen, rejected)
            problem = _token_problem(text.pair, tokenized)
            if problem is not None:
                problems.append(problem)
                continue
            done.pairs.append(tokenized)
            done.tokenized_apart += chosen_apart or rejected_apart
        return problems

    def _answer(self, answer: str, prompt: TokenIds, whole: TokenIds) -> tuple[TokenIds, bool]:
        """The answer's ids, and whether they had to be made apart from the prompt."""
        is_prefix = len(prompt) <= len(whole) and np.array_equal(whole[: len(prompt)], prompt)
        ids = whole[len(prompt) :] if is_prefix else self._ids([answer], special_tokens=False)[0]
        if self.chat_template is None and (len(ids) == 0 or ids[-1] != self.eos_token_id):
            ids = np.append(ids, np.int32(self.eos_token_id))  # EOS whose text the tokenizer reads as something else
        return ids, not is_prefix

    def _ids(self, texts: list[str], *, special_tokens: bool) -> list[TokenIds]:
        encoded = self.tokenizer(
            texts,
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text over model_max_length is on_too_long's business
        )["input_ids"]
        suffix = self._suffix_tokens if special_tokens else 0
        return [np.array(ids[: len(ids) - suffix], dtype=np.int32) for ids in encoded]

    def _check_kwargs(self) -> None:
        taken = [name for name in self.chat_template_kwargs if name in _RESERVED_KWARGS]
        if taken:
            raise ConfigError(
                [
                    Problem(
                        where=f"policy.tokenizer.chat_template_kwargs.{name}",
                        value=self.chat_template_kwargs[name],
                        expected="a variable of the template",
                        fix="remove it: the line between prompt and answer is drawn with it",
                    )
                    for name in taken
                ]
            )


def _as_messages(text: str | tuple[Message, ...], role: str) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


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
            where=pair.source,
            value="a prompt without tokens",
            expected="at least one token before the answers, which predicts their first",
            fix="give the pair a prompt, or use a tokenizer that begins a text with BOS",
        )
    for name, tokens in (("chosen", tokenized.chosen_tokens), ("rejected", tokenized.rejected_tokens)):
        if tokens == 0:
            return Problem(
                where=pair.source,
                value=f"a {name} answer without tokens after the chat template",
                expected="a template that writes the answer after the prompt",
                fix="mend policy.tokenizer.chat_template",
            )
    if np.array_equal(tokenized.chosen_ids, tokenized.rejected_ids):
        return Problem(
            where=pair.source,
            value="answers that differ as text, but not as tokens",
            expected="two different answers",
            fix="remove the row: its answers differ only in what tokenizer or chat template drop, such as white space",
        )
    return None


def _rewritten_prompt(pair: PreferencePair) -> Problem:
    return Problem(
        where=pair.source,
        value="a chat template that writes the prompt differently once an answer follows",
        expected="the prompt alone, opened for the assistant, to be what prompt and answer begin with",
        fix="set policy.tokenizer.chat_template_kwargs (such as enable_thinking) or chat_template so that it is",
    )


def _refused_by_template(pair: PreferencePair, error: Exception) -> Problem:
    return Problem(
        where=pair.source,
        value=f"messages that the chat template refuses: {error}",
        expected="roles and an order of turns that the template takes",
        fix="change the row's messages, or set policy.tokenizer.chat_template",
    )
