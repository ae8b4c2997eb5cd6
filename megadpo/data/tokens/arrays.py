"""Tokenised pairs as flat arrays, what became of a file's rows, and a fingerprint of both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megadpo.data.formats.recognise import FieldKeys
from megadpo.data.pairs import TokenIds, TokenizedPair, with_mask, without_mask
from megadpo.data.sources.rows import OnBadRow
from megadpo.data.tokens.limit import OnTooLong
from megadpo.data.tokens.tokenizer import OWN_TEMPLATE
from megadpo.data.tokens.turns import LossOn

if TYPE_CHECKING:
    from megadpo.config.schema import Config

_FINGERPRINT_VERSION = "megadpo pairs 1"


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What decides a file's tokens, besides the file and the tokenizer."""

    max_total_sequence_length: int
    on_too_long: OnTooLong = "refuse"
    chat_template: str | None = OWN_TEMPLATE
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    keys: FieldKeys = field(default_factory=FieldKeys)
    dataset_name: str | None = None
    loss_on: LossOn = "last_turn"
    on_bad_row: OnBadRow = "refuse"

    @classmethod
    def from_config(cls, cfg: Config) -> DataSettings:
        """The settings of a run. `data.max_input_seq_length` can only lower the limit."""
        return cls(
            max_total_sequence_length=min(cfg.policy.max_total_sequence_length, cfg.data.max_input_seq_length),
            on_too_long=cfg.data.on_too_long,
            chat_template=cfg.policy.tokenizer.chat_template,
            chat_template_kwargs=cfg.policy.tokenizer.chat_template_kwargs or {},
            keys=FieldKeys(cfg.data.prompt_key, cfg.data.chosen_key, cfg.data.rejected_key),
            dataset_name=cfg.data.dataset_name,
            loss_on=cfg.data.loss_on,
            on_bad_row=cfg.data.on_bad_row,
        )


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What became of a file's rows. Pairs unless the name says tokens."""

    path: str
    rows: int
    pairs: int
    tokenized_apart: int
    dropped_too_long: int
    truncated: int
    dropped_equal_after_truncation: int
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    with_chat_template: bool
    dropped_unanswered_after_truncation: int = 0
    dropped_bad_rows: int = 0
    """Rows that no pair could be made of, with `data.on_bad_row: drop`."""
    first_bad_row: str = ""
    """What was wrong with the first of them; empty if there was none."""

    @property
    def shared_prompt_saving(self) -> float:
        """Share (0..1) of the tokens that a prompt computed once saves against one computed twice."""
        saved = self.prompt_tokens
        return saved / (2 * saved + self.chosen_tokens + self.rejected_tokens)

    def __str__(self) -> str:
        """One line for the log; counts of zero are left out, but for the rows and pairs."""
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


@dataclass(frozen=True, eq=False)
class TokenArrays:
    """N pairs as flat arrays."""

    tokens: TokenIds
    """int32 [all tokens]: prompt, chosen, rejected of pair 0, then of pair 1, ...; with their loss masks, as
    `pairs.with_mask` keeps them."""
    offsets: npt.NDArray[np.int64]
    """int64 [3N + 1]: text k is tokens[offsets[k] : offsets[k + 1]]."""
    rows: npt.NDArray[np.int64]
    """int64 [N]: row of the file."""

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair]) -> TokenArrays:
        texts = []
        for pair in pairs:
            chosen = with_mask(pair.chosen_ids, pair.chosen_mask)
            texts += [pair.prompt_ids, chosen, with_mask(pair.rejected_ids, pair.rejected_mask)]
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in texts], out=offsets[1:])
        tokens = np.concatenate(texts) if texts else np.empty(0, dtype=np.int32)
        return cls(tokens, offsets, np.array([pair.index for pair in pairs], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, position: int) -> TokenizedPair:
        """Pair at `position` in [0, N); its arrays are views, but for an answer with a loss mask."""
        bounds = self.offsets[3 * position : 3 * position + 4]
        prompt, chosen, rejected = (self.tokens[start:end] for start, end in pairwise(bounds))
        (chosen, chosen_mask), (rejected, rejected_mask) = without_mask(chosen), without_mask(rejected)
        return TokenizedPair(int(self.rows[position]), prompt, chosen, rejected, chosen_mask, rejected_mask)

    def text_tokens(self) -> npt.NDArray[np.int64]:
        """int64 [N, 3]: tokens of prompt, chosen and rejected."""
        return np.diff(self.offsets).reshape(-1, 3)


@dataclass(frozen=True, kw_only=True)
class TokenizedFile:
    """One data file, tokenised."""

    arrays: TokenArrays
    lines: npt.NDArray[np.int64]
    """int64 [rows of the file]: line of each row; 0 where the row was left out."""
    report: DataReport
    fingerprint: str
    max_token_id: int
    release: Callable[[], None] = field(default=lambda: None)
    """Gives mapped token ids back to the kernel's cache: they stay readable, and count to this process no more."""


class Fingerprint:
    """sha256 over settings, tokens, offsets and rows: the same for the same pairs, however they were come by."""

    def __init__(self, settings_text: str) -> None:
        self._digest = hashlib.sha256(f"{_FINGERPRINT_VERSION}\n{settings_text}\n".encode())

    def add(self, array: npt.NDArray[np.integer[Any]]) -> None:
        """All of the tokens, in as many pieces as one likes; then the offsets; then the rows."""
        little_endian = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        self._digest.update(little_endian.view(np.uint8).data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
