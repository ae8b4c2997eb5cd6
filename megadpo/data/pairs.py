"""Pairs as token ids: one, many as flat arrays, and a data set of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias, overload

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.int32]
"""Token ids of one text, int32 [n]."""

LossMask: TypeAlias = npt.NDArray[np.bool_]
"""Whether each token of an answer is in the loss, bool [n]."""


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """A pair as token ids, each int32 [n]. `prompt_ids + chosen_ids` is one sequence of the model, and
    `prompt_ids + rejected_ids` the other; the answers hold their end-of-sequence token."""

    index: int
    """Row of the file, from 0: what logs and evaluation files call the pair."""
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_mask: LossMask | None = None
    """None: every token of the answer is in the loss. Otherwise at least one is."""
    rejected_mask: LossMask | None = None

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
        """Length of the longer of prompt+chosen and prompt+rejected: what `max_total_sequence_length` bounds."""
        return self.prompt_tokens + max(self.chosen_tokens, self.rejected_tokens)


@dataclass(frozen=True, eq=False)
class FlatPairs(Sequence[TokenizedPair]):
    """N pairs as flat arrays, 4 bytes a token."""

    tokens: TokenIds
    """int32 [all tokens]: prompt, chosen, rejected of pair 0, then of pair 1, ... A token outside the loss stands as its
    complement, ~id, which is negative."""
    offsets: npt.NDArray[np.int64]
    """int64 [3N + 1]: text k is tokens[offsets[k] : offsets[k + 1]]."""
    rows: npt.NDArray[np.int64]
    """int64 [N]: row of the file."""

    @staticmethod
    def of(pairs: Sequence[TokenizedPair]) -> FlatPairs:
        """The same pairs, their arrays copied."""
        texts = []
        for pair in pairs:
            chosen = _with_mask(pair.chosen_ids, pair.chosen_mask)
            texts += [pair.prompt_ids, chosen, _with_mask(pair.rejected_ids, pair.rejected_mask)]
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in texts], out=offsets[1:])
        tokens = np.concatenate(texts) if texts else np.empty(0, dtype=np.int32)
        return FlatPairs(tokens, offsets, np.array([pair.index for pair in pairs], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> TokenizedPair: ...

    @overload
    def __getitem__(self, position: slice) -> list[TokenizedPair]: ...

    def __getitem__(self, position: int | slice) -> TokenizedPair | list[TokenizedPair]:
        """The pair at `position`; its arrays are views, except for an answer with a loss mask. Its `.index` is the row
        of the file, which differs where rows were dropped. A slice gives a list."""
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        number = position + len(self) if position < 0 else position
        if not 0 <= number < len(self):
            raise IndexError(f"position {position} of {len(self)} pairs")
        bounds = self.offsets[3 * number : 3 * number + 4]
        prompt, chosen, rejected = (self.tokens[start:end] for start, end in pairwise(bounds))
        (chosen, chosen_mask), (rejected, rejected_mask) = _without_mask(chosen), _without_mask(rejected)
        return TokenizedPair(int(self.rows[number]), prompt, chosen, rejected, chosen_mask, rejected_mask)

    def text_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [N, 3]: tokens of prompt, chosen and rejected."""
        return np.diff(self.offsets).reshape(-1, 3)

    def packed_tokens(self, *, share_prompt: bool) -> npt.NDArray[np.int64]:
        """int64 [N]: tokens that each pair takes in a pack; a shared prompt counts once."""
        return self.text_tokens() @ np.array([1 if share_prompt else 2, 1, 1], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of a source's rows. Counts are of pairs unless the name says tokens."""

    path: str
    rows: int
    pairs: int
    tokenized_apart: int = 0
    dropped_too_long: int = 0
    truncated: int = 0
    dropped_equal_after_truncation: int = 0
    dropped_unanswered_after_truncation: int = 0
    dropped_bad_rows: int = 0
    """Rows that no pair could be made of, with `data.on_bad_row: drop`."""
    first_bad_row: str = ""
    """What was wrong with the first of them; empty if there was none."""
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    with_chat_template: bool
    max_token_id: int
    """The largest token id, to hold against the model's vocabulary."""
    fingerprint: str
    """sha256 over the tokens, their rows and the settings; the file's name and place don't matter."""

    @property
    def shared_prompt_saving(self) -> float:
        """Share (0..1) of the tokens that a prompt computed once saves against one computed twice."""
        saved = self.prompt_tokens
        return saved / (2 * saved + self.chosen_tokens + self.rejected_tokens)

    def __str__(self) -> str:
        """One line for the log; counts of zero are left out, except for the rows and pairs."""
        parts = [f"{self.path}: {self.rows} rows, {self.pairs} pairs"]
        for count, words in (
            (self.dropped_too_long, "dropped as too long"),
            (self.truncated, "cut to the limit"),
            (self.dropped_equal_after_truncation, "dropped because the cut made their answers equal"),
            (self.dropped_unanswered_after_truncation, "dropped because the cut took an answer's turns in the loss"),
            (self.dropped_bad_rows, f"rows left out that can't be used (the first: {self.first_bad_row})"),
            (self.tokenized_apart, "whose prompt and answer merge in a token, answers tokenised apart"),
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


@dataclass(frozen=True, eq=False)
class PairDataset(FlatPairs):
    """The pairs of one source, in memory or mapped from the cache."""

    lines: npt.NDArray[np.int64]
    """int64 [rows of the file]: line of each row; 0 where the row was left out."""
    report: DataReport
    release: Callable[[], None] = _nothing
    """Gives token ids that are mapped from the cache back to the kernel: they stay readable, and no longer count as this
    process's memory."""

    @property
    def fingerprint(self) -> str:
        return self.report.fingerprint

    @property
    def max_token_id(self) -> int:
        return self.report.max_token_id

    def source_of(self, row: int) -> str:
        """`file:line` of a row of the file, for messages about a pair by its index."""
        return f"{self.report.path}:{self.lines[row]}"


def _with_mask(ids: TokenIds, mask: LossMask | None) -> TokenIds:
    """Ids and loss mask in one array: a token outside the loss as its complement."""
    return ids if mask is None else np.where(mask, ids, ~ids)


def _without_mask(stored: TokenIds) -> tuple[TokenIds, LossMask | None]:
    """What `_with_mask` was made of; a view of the ids where every token is in the loss."""
    mask = stored >= 0
    return (stored, None) if mask.all() else (np.where(mask, stored, ~stored), mask)


def largest_id(stored: TokenIds) -> int:
    """The largest token id of FlatPairs.tokens."""
    return max(int(stored.max()), ~int(stored.min()))
