"""Pairs as token ids: one, many as flat arrays, and a data set of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt
import xxhash

TokenIds: TypeAlias = npt.NDArray[np.int32]
"""Token ids of one text, int32 [n]."""

Ints: TypeAlias = npt.NDArray[np.int64]

LossMask: TypeAlias = npt.NDArray[np.bool_]
"""Whether each token of an answer is in the loss, bool [n]."""


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """A pair as token ids, each int32 [n]. `prompt_ids + chosen_ids` is one sequence of the model, and
    `prompt_ids + rejected_ids` the other; the answers hold their end-of-sequence token."""

    index: int
    """Row of the file, from 0. Logs and evaluation files name a pair by it."""
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_mask: LossMask | None = None
    """None: every token of the answer is in the loss. A mask has at least one true entry."""
    rejected_mask: LossMask | None = None
    weight: float = 1.0
    """The pair's loss is multiplied by this."""
    rewards: tuple[float, float] = (math.nan, math.nan)
    """Of the chosen and of the rejected answer; NaN: the row has none."""
    whole_prompt_ids: TokenIds | None = None
    """The prompt before it was cut to a limit. None: `prompt_ids`."""

    @property
    def answers(self) -> tuple[tuple[TokenIds, LossMask | None], tuple[TokenIds, LossMask | None]]:
        """Chosen and rejected, with their masks."""
        return (self.chosen_ids, self.chosen_mask), (self.rejected_ids, self.rejected_mask)

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def chosen_tokens(self) -> int:
        return len(self.chosen_ids)

    @property
    def rejected_tokens(self) -> int:
        return len(self.rejected_ids)

    @property
    def longest_sequence_tokens(self) -> int:
        """Length of the longer of prompt+chosen and prompt+rejected; `max_total_sequence_length` limits it."""
        return self.prompt_tokens + max(self.chosen_tokens, self.rejected_tokens)


class Pairs(Sequence[TokenizedPair]):
    """N pairs, and arrays of facts about them."""

    rows: Ints
    """int64 [N]: the number by which logs and evaluation files name each pair."""
    identities: Ints
    """int64 [4N]: for each pair hashes of its three texts as they stand in `tokens`, and of its prompt before it was cut to a
    limit. Equal prompts have equal ones, and so have answers with the same tokens and the same loss mask."""
    values: npt.NDArray[np.float64]
    """float64 [3N]: weight of pair 0, reward of its chosen and of its rejected answer (NaN: none), weight of pair 1, ..."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> TokenizedPair: ...

    @overload
    def __getitem__(self, position: slice) -> list[TokenizedPair]: ...

    def __getitem__(self, position: int | slice) -> TokenizedPair | list[TokenizedPair]:
        """The pair at `position`. Its arrays are views, except for an answer with a loss mask. Its `.index` is that of
        `rows`, which differs from `position` if rows were dropped. A slice gives a list."""
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = position + len(self) if position < 0 else position
        if not 0 <= number < len(self):
            raise IndexError(f"position {position} of {len(self)} pairs")
        return self.pair(number)

    def pair(self, number: int) -> TokenizedPair:
        """The pair at `number`, from 0 to N - 1."""
        raise NotImplementedError

    def text_tokens(self) -> Ints:
        """int64 [N, 3]: tokens of prompt, chosen and rejected."""
        raise NotImplementedError

    def text(self, number: int) -> TokenIds:
        """Text `number`, 3 for each pair, with its loss mask: a token outside the loss is ~id, which is negative."""
        raise NotImplementedError

    def first_tokens(self, texts: Ints, count: int) -> TokenIds:
        """int32 [texts, count]: what each of these texts, which have as many tokens at least, begins with, as `text` has it."""
        raise NotImplementedError

    def packed_tokens(self, *, share_prompt: bool) -> Ints:
        """int64 [N]: tokens of each pair in a pack. A shared prompt counts once."""
        return self.text_tokens() @ np.array([1 if share_prompt else 2, 1, 1], dtype=np.int64)

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """float64 [N]."""
        return self.values[0::3]

    @property
    def reward_gaps(self) -> npt.NDArray[np.float64]:
        """float64 [N]: the chosen answer's reward minus the rejected one's; NaN where a row lacks one."""
        return self.values[1::3] - self.values[2::3]


@dataclass(frozen=True, eq=False)
class FlatPairs(Pairs):
    """Pairs as flat arrays, with 4 bytes for each token."""

    tokens: TokenIds
    """int32 [all tokens]: prompt, chosen, rejected of pair 0, then of pair 1, ... A token outside the loss is stored as
    ~id, which is negative."""
    offsets: npt.NDArray[np.int64]
    """int64 [3N + 1]: text k is tokens[offsets[k] : offsets[k + 1]]."""
    rows: Ints
    """int64 [N]: row of the file."""
    identities: Ints
    values: npt.NDArray[np.float64]

    @staticmethod
    def of(pairs: Sequence[TokenizedPair]) -> FlatPairs:
        """The same pairs, their arrays copied."""
        texts, hashes = [], []
        for pair in pairs:
            chosen, rejected = (_with_mask(*answer) for answer in pair.answers)
            texts += [pair.prompt_ids, chosen, rejected]
            hashes += [_hash(pair.prompt_ids), _hash(chosen), _hash(rejected)]
            hashes.append(hashes[-3] if pair.whole_prompt_ids is None else _hash(pair.whole_prompt_ids))
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in texts], out=offsets[1:])
        tokens = np.concatenate(texts) if texts else np.empty(0, dtype=np.int32)
        identities = np.array(hashes, dtype=np.uint64).view(np.int64)
        rows = np.array([pair.index for pair in pairs], dtype=np.int64)
        values = np.array([(pair.weight, *pair.rewards) for pair in pairs], dtype=np.float64).ravel()
        return FlatPairs(tokens, offsets, rows, identities, values)

    def pair(self, number: int) -> TokenizedPair:
        bounds = self.offsets[3 * number : 3 * number + 4]
        prompt, chosen, rejected = (self.tokens[start:end] for start, end in pairwise(bounds))
        (chosen, chosen_mask), (rejected, rejected_mask) = _without_mask(chosen), _without_mask(rejected)
        weight, *rewards = self.values[3 * number : 3 * number + 3].tolist()
        masks = chosen_mask, rejected_mask
        return TokenizedPair(int(self.rows[number]), prompt, chosen, rejected, *masks, weight, (rewards[0], rewards[1]))

    def text_tokens(self) -> Ints:
        return np.diff(self.offsets).reshape(-1, 3)

    def text(self, number: int) -> TokenIds:
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def first_tokens(self, texts: Ints, count: int) -> TokenIds:
        found: TokenIds = self.tokens[self.offsets[texts][:, None] + np.arange(count)]
        return found


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What happened to the rows of a source. Numbers count pairs, unless the name says tokens."""

    path: str
    rows: int
    pairs: int
    tokenized_apart: int = 0
    dropped_too_long: int = 0
    truncated: int = 0
    dropped_equal_after_truncation: int = 0
    dropped_unanswered_after_truncation: int = 0
    dropped_bad_rows: int = 0
    """Invalid rows left out with `data.on_bad_row: drop`."""
    first_bad_row: str = ""
    """What was wrong with the first invalid row; empty if there was none."""
    weighted: int = 0
    """Pairs with another weight than 1."""
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    with_chat_template: bool
    max_token_id: int
    """The largest token id; it must be below the model's vocabulary size."""
    fingerprint: str
    """sha256 of the tokens, their rows, weights, rewards and the settings. The file's name and folder don't change it."""

    @property
    def shared_prompt_saving(self) -> float:
        """Share (0..1) of the tokens saved by computing each prompt once instead of twice."""
        saved = self.prompt_tokens
        return saved / (2 * saved + self.chosen_tokens + self.rejected_tokens)

    def __str__(self) -> str:
        """One line for the log. Zero counts are left out, except those of rows and pairs."""
        parts = [f"{self.path}: {self.rows} rows, {self.pairs} pairs"]
        for count, words in (
            (self.dropped_too_long, "dropped as too long"),
            (self.truncated, "cut to the limit"),
            (self.dropped_equal_after_truncation, "dropped because truncation made their answers equal"),
            (self.dropped_unanswered_after_truncation, "dropped because truncation left no answer tokens in the loss"),
            (self.dropped_bad_rows, f"invalid rows left out (the first: {self.first_bad_row})"),
            (self.weighted, "with a weight other than 1"),
            (self.tokenized_apart, "with the answer tokenised alone, since one token would span prompt and answer"),
        ):
            if count:
                parts.append(f"{count} {words}")
        totals = (self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)
        named = zip(("prompt", "chosen", "rejected"), totals, strict=True)
        mean = ", ".join(f"{name} {total / self.pairs:.0f}" for name, total in named)
        template = "with the chat template" if self.with_chat_template else "as plain text"
        return ", ".join(parts) + f"; {template}, mean tokens: {mean}"


def _nothing() -> None:
    pass


class OpenedPairs(Pairs):
    """The pairs of one or several sources."""

    report: DataReport
    release: Callable[[], None]
    """Frees the memory of token ids that are mapped from the cache. They stay readable; the next access loads them
    again."""

    @property
    def reports(self) -> Sequence[DataReport]:
        """Of each source."""
        return [self.report]

    @property
    def fingerprint(self) -> str:
        return self.report.fingerprint

    @property
    def max_token_id(self) -> int:
        return self.report.max_token_id

    def source_of(self, row: int) -> str:
        """`file:line` of one of `rows`, for messages."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PairDataset(FlatPairs, OpenedPairs):
    """The pairs of one source, in memory or mapped from the cache."""

    lines: npt.NDArray[np.int64]
    """int64 [rows of the file]: line of each row; 0 if the row was left out."""
    report: DataReport
    release: Callable[[], None] = _nothing

    def source_of(self, row: int) -> str:
        return f"{self.report.path}:{self.lines[row]}"


def _hash(ids: TokenIds) -> int:
    return xxhash.xxh3_64_intdigest(ids.tobytes())


def _with_mask(ids: TokenIds, mask: LossMask | None) -> TokenIds:
    """Ids and loss mask as one array: a token outside the loss becomes ~id."""
    return ids if mask is None else np.where(mask, ids, ~ids)


def _without_mask(stored: TokenIds) -> tuple[TokenIds, LossMask | None]:
    """Ids and mask from an array of `_with_mask`. If every token is in the loss, the ids are a view."""
    mask = stored >= 0
    return (stored, None) if mask.all() else (np.where(mask, stored, ~stored), mask)


def largest_id(stored: TokenIds) -> int:
    """The largest token id of FlatPairs.tokens."""
    return max(int(stored.max()), ~int(stored.min()))
