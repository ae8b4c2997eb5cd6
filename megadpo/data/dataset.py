"""A data file as a sequence of tokenised pairs, held flat in memory: about 4 bytes a token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.data.formats import FieldKeys
from megadpo.data.limit import OnTooLong, apply_limit
from megadpo.data.pairs import TokenIds, TokenizedPair, largest_id, with_mask, without_mask
from megadpo.data.reader import OnBadRow, ReadCounts, read_pairs
from megadpo.data.tokenization import PairTokenizer
from megadpo.data.tokenization_turns import LossOn
from megadpo.data.tokenizer import OWN_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    dropped_unanswered_after_truncation: int
    dropped_bad_rows: int
    """Rows that no pair could be made of, with `data.on_bad_row: drop`."""
    first_bad_row: str
    """What was wrong with the first of them; empty if there was none."""
    prompt_tokens: int
    chosen_tokens: int
    rejected_tokens: int
    with_chat_template: bool

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


class TokenizedPairs(Sequence[TokenizedPair]):
    """N pairs, what became of the file's other rows, and a fingerprint of it all."""

    def __init__(
        self, arrays: TokenArrays, report: DataReport, lines: npt.NDArray[np.int64], settings_text: str
    ) -> None:
        self.arrays = arrays
        self.report = report
        self._lines = lines  # int64 [rows of the file]
        self.fingerprint: str = _fingerprint(arrays, settings_text)
        """sha256 over the tokens, their rows and the settings; the file's name and place don't matter."""

    def __len__(self) -> int:
        return len(self.arrays)

    @overload
    def __getitem__(self, position: int) -> TokenizedPair: ...

    @overload
    def __getitem__(self, position: slice) -> list[TokenizedPair]: ...

    def __getitem__(self, position: int | slice) -> TokenizedPair | list[TokenizedPair]:
        """The TokenizedPair at `position`. Its `.index` is the row of the file, which differs where rows were
        dropped. A slice gives a list."""
        if isinstance(position, slice):
            return [self.arrays.pair(number) for number in range(*position.indices(len(self)))]
        number = position + len(self) if position < 0 else position
        if not 0 <= number < len(self):
            raise IndexError(f"position {position} of {len(self)} pairs")
        return self.arrays.pair(number)

    @property
    def max_token_id(self) -> int:
        """The largest token id, to hold against the model's vocabulary."""
        return largest_id(self.arrays.tokens)

    def packed_tokens(self, *, share_prompt: bool) -> npt.NDArray[np.int64]:
        """int64 [N]: tokens that each pair takes in a pack."""
        return self.arrays.text_tokens() @ np.array([1 if share_prompt else 2, 1, 1], dtype=np.int64)

    def source_of(self, row: int) -> str:
        """`file:line` of a row of the file, for messages about a pair by its index."""
        return f"{self.report.path}:{self._lines[row]}"


class PairDataset(TokenizedPairs):
    """The pairs of one file under a run's config."""

    def __init__(self, cfg: Config, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
        """Raises DataError for everything wrong with the file, ConfigError for an unusable tokenizer or template."""
        self._load(path, tokenizer, DataSettings.from_config(cfg))

    @classmethod
    def with_settings(cls, path: str | Path, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> PairDataset:
        """The same without a config."""
        dataset = cls.__new__(cls)
        dataset._load(path, tokenizer, settings)
        return dataset

    def _load(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
        encoder = PairTokenizer(
            tokenizer,
            chat_template=settings.chat_template,
            chat_template_kwargs=settings.chat_template_kwargs,
            loss_on=settings.loss_on,
        )
        counts = ReadCounts()
        texts = read_pairs(
            path,
            settings.keys,
            dataset_name=settings.dataset_name,
            on_bad_row=settings.on_bad_row,
            counts=counts,
        )
        encoded = encoder.encode(texts, on_bad_row=settings.on_bad_row)
        bad = [*counts.bad_rows, *encoded.bad_pairs]
        if not encoded.pairs:
            raise DataError(bad)
        limited = apply_limit(
            encoded.pairs,
            max_tokens=settings.max_total_sequence_length,
            on_too_long=settings.on_too_long,
            sources=encoded.sources,
            bos_token_id=tokenizer.bos_token_id,
        )
        if not limited.pairs:
            raise DataError(_nothing_left(str(path), settings, counts.rows))
        arrays = TokenArrays.of(limited.pairs)
        prompt_tokens, chosen_tokens, rejected_tokens = (int(total) for total in arrays.text_tokens().sum(axis=0))
        report = DataReport(
            path=str(path),
            rows=counts.rows,
            pairs=len(arrays),
            tokenized_apart=encoded.tokenized_apart,
            dropped_too_long=limited.dropped_too_long,
            truncated=limited.truncated,
            dropped_equal_after_truncation=limited.dropped_equal_after_truncation,
            dropped_unanswered_after_truncation=limited.dropped_unanswered_after_truncation,
            dropped_bad_rows=counts.dropped_bad_rows + encoded.dropped_bad_pairs,
            first_bad_row=str(bad[0]) if bad else "",
            prompt_tokens=prompt_tokens,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            with_chat_template=encoder.chat_template is not None,
        )
        lines = np.zeros(counts.rows, dtype=np.int64)
        lines[[pair.row for pair in texts]] = [pair.line for pair in texts]
        settings_text = _settings_text(settings, encoder)
        TokenizedPairs.__init__(self, arrays, report, lines, settings_text)


def _settings_text(settings: DataSettings, encoder: PairTokenizer) -> str:
    return json.dumps(
        {
            "max_total_sequence_length": settings.max_total_sequence_length,
            "on_too_long": settings.on_too_long,
            "chat_template": encoder.chat_template,
            "chat_template_kwargs": encoder.chat_template_kwargs,
            "eos_token_id": encoder.eos_token_id,
        },
        sort_keys=True,
        default=str,
    )


def _fingerprint(arrays: TokenArrays, settings_text: str) -> str:
    digest = hashlib.sha256(f"{_FINGERPRINT_VERSION}\n{settings_text}\n".encode())
    for array in (arrays.tokens, arrays.offsets, arrays.rows):
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _nothing_left(path: str, settings: DataSettings, rows: int) -> Problem:
    return Problem(
        where=path,
        value=f"no pair left of {rows}: all are longer than {settings.max_total_sequence_length} tokens",
        expected="at least one pair",
        fix="raise policy.max_total_sequence_length, or set data.on_too_long: truncate",
    )
