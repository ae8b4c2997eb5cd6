"""Tokenises a source chunk by chunk, in several processes, in constant memory."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.config.variants import FORMATS
from megadpo.data.formats import PreferencePair
from megadpo.data.formats.read_pairs import OnBadRow, ReadCounts, read_pairs
from megadpo.data.pairs import DataReport, FlatPairs, largest_id
from megadpo.data.sources import MOST_PROBLEMS
from megadpo.data.tokens.chunk import Chunk, OnTooLong, TooLong, apply_limit
from megadpo.data.tokens.tokenization import PairTokenizer
from megadpo.data.tokens.tokenizer import OWN_TEMPLATE
from megadpo.data.tokens.turns import LossOn
from megadpo.data.tokens.workers import ordered_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadpo.config.schema import Config

CHUNK_PAIRS = 1024
ALONE_CHUNKS = 8
"""Chunks that this process tokenises before it starts others. Starting them takes seconds, and most files are small."""

_FINGERPRINT_VERSION = "megadpo pairs 1"
_PROGRESS_S = 10.0

Sink: TypeAlias = Callable[[str, npt.NDArray[Any]], None]
"""Gets the arrays of a PairDataset in pieces: (name, values), where the name is
'tokens', 'offsets', 'rows', 'identities', 'values' or 'lines'."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The settings that change the tokens of a source."""

    max_total_sequence_length: int
    on_too_long: OnTooLong = "refuse"
    chat_template: str | None = OWN_TEMPLATE
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    format_options: Mapping[str, Any] = field(default_factory=FORMATS.defaults)
    dataset_name: str | None = None
    loss_on: LossOn = "last_turn"
    on_bad_row: OnBadRow = "refuse"
    media_tokens: tuple[int, ...] = ()
    """Architecture's: rows with one of these ids are refused."""

    @classmethod
    def from_config(cls, cfg: Config, media_tokens: tuple[int, ...] = ()) -> DataSettings:
        """The settings of a run. `data.max_input_seq_length` can only lower the limit."""
        return cls(
            max_total_sequence_length=min(cfg.policy.max_total_sequence_length, cfg.data.max_input_seq_length),
            on_too_long=cfg.data.on_too_long,
            chat_template=cfg.policy.tokenizer.chat_template,
            chat_template_kwargs=cfg.policy.tokenizer.chat_template_kwargs or {},
            format_options=cfg.data.format_options,
            dataset_name=cfg.data.dataset_name,
            loss_on=cfg.data.loss_on,
            on_bad_row=cfg.data.on_bad_row,
            media_tokens=media_tokens,
        )

    def pair_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> PairTokenizer:
        """The tokenizer with these settings. Raises ConfigError for an unusable tokenizer or template."""
        return PairTokenizer(
            tokenizer,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            loss_on=self.loss_on,
            media_tokens=self.media_tokens,
        )

    def text(self, encoder: PairTokenizer) -> str:
        """The settings as text for the fingerprint. It has a template's text, not its file's name."""
        return json.dumps(
            {
                "max_total_sequence_length": self.max_total_sequence_length,
                "on_too_long": self.on_too_long,
                "chat_template": encoder.chat_template,
                "chat_template_kwargs": encoder.chat_template_kwargs,
                "eos_token_id": encoder.eos_token_id,
            },
            sort_keys=True,
            default=str,
        )


def encode_source(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    sink: Sink,
    num_workers: int = 1,
    show_progress: bool = False,
) -> DataReport:
    """Reads and tokenises a source into `sink`. The order is the source's, for any number of processes.

    show_progress: print a line to stderr every 10 s.
    Raises DataError with all problems of the source, ConfigError for an unusable tokenizer or template, and if one of
    several processes died.
    """
    encode = _ChunkEncoder(tokenizer, settings)
    chunks = _Chunks(source, settings)
    result = _Result(sink, settings, encode.encoder)
    progress = _Progress(str(source)) if show_progress else None
    for chunk in ordered_map(encode, iter(chunks), num_workers=num_workers, alone=ALONE_CHUNKS):
        result.add(chunk)
        if len(result.problems) >= MOST_PROBLEMS:
            raise DataError(result.problems[:MOST_PROBLEMS])
        if progress is not None:
            progress.at(result.counts["rows"])
    problems = [*chunks.problems, *result.problems, *result.too_long.problems()]
    result.add_left_out(chunks.read)
    if not problems and result.counts["pairs"] == 0:
        problems = result.bad_rows or [_nothing_left(str(source), settings, result.counts["rows"])]
    if problems:
        raise DataError(problems)
    return result.report(str(source))


class _Chunks:
    """The pairs of a source in chunks, those of a row in one. Problems are collected, to be reported together at the end."""

    def __init__(self, source: str | Path, settings: DataSettings) -> None:
        self._source = source
        self._settings = settings
        self.problems: list[Problem] = []
        self.read = ReadCounts()

    def __iter__(self) -> Iterator[list[PreferencePair]]:
        chunk: list[PreferencePair] = []
        for _, of_row in groupby(self._pairs(), key=lambda pair: pair.place.row):
            chunk += of_row
            if len(chunk) >= CHUNK_PAIRS:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _pairs(self) -> Iterator[PreferencePair]:
        try:
            yield from read_pairs(
                self._source,
                self._settings.format_options,
                dataset_name=self._settings.dataset_name,
                on_bad_row=self._settings.on_bad_row,
                counts=self.read,
            )
        except DataError as error:
            self.problems = error.problems


class _ChunkEncoder:
    """Tokenises pairs and applies the length limit. It is pickled for other processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
        self._settings = settings
        self.encoder = settings.pair_tokenizer(tokenizer)

    def __call__(self, pairs: Sequence[PreferencePair]) -> Chunk:
        chunk = self.encoder.encode(pairs, on_bad_row=self._settings.on_bad_row)
        limit, bos_token_id = self._settings.max_total_sequence_length, self.encoder.tokenizer.bos_token_id
        apply_limit(chunk, limit, self._settings.on_too_long, bos_token_id)
        chunk.pairs = FlatPairs.of(chunk.pairs)  # three arrays are sent faster than three for each pair
        return chunk


class _Result:
    """The sum of all chunks of a source."""

    def __init__(self, sink: Sink, settings: DataSettings, encoder: PairTokenizer) -> None:
        self.problems: list[Problem] = []
        self.too_long = TooLong(settings.max_total_sequence_length)
        self.counts: Counter[str] = Counter()
        self.bad_rows: list[Problem] = []
        self._with_chat_template = encoder.chat_template is not None
        self._refuses = settings.on_bad_row == "refuse"
        self._next_row = 0
        self._sink = sink
        self._digest = hashlib.sha256(f"{_FINGERPRINT_VERSION}\n{settings.text(encoder)}\n".encode())
        self._offsets = [np.zeros(1, dtype=np.int64)]
        self._rows: list[npt.NDArray[np.int64]] = []
        self._values: list[npt.NDArray[np.float64]] = []
        self._largest = 0
        sink("offsets", self._offsets[0])

    def add(self, chunk: Chunk) -> None:
        """Adds the next chunk. After the first problem, only problems are added."""
        if self._refuses:
            self.problems += chunk.problems
        else:
            self.bad_rows += chunk.problems[: MOST_PROBLEMS - len(self.bad_rows)]
        self.too_long.add(chunk.too_long)
        pairs = chunk.pairs
        assert isinstance(pairs, FlatPairs), "_ChunkEncoder makes FlatPairs"
        self.counts.update(chunk.counts, rows=len({place.row for place in chunk.places}), pairs=len(pairs))
        if self.problems or self.too_long.count:
            return
        prompt, chosen, rejected = pairs.text_tokens().sum(axis=0).tolist()
        self.counts.update(prompt_tokens=prompt, chosen_tokens=chosen, rejected_tokens=rejected)
        offsets = pairs.offsets[1:] + self._offsets[-1][-1:]
        if len(pairs):
            self._offsets.append(offsets)
            self._rows.append(pairs.rows)
            self._add_to_digest(pairs.tokens)
            self._values.append(pairs.values)
            self.counts.update(weighted=int((pairs.weights != 1).sum()))
            self._largest = max(self._largest, largest_id(pairs.tokens))
        lines = np.concatenate([np.zeros(chunk.first_row - self._next_row, dtype=np.int64), chunk.lines()])
        self._next_row += len(lines)
        named = {
            "tokens": pairs.tokens,
            "offsets": offsets,
            "rows": pairs.rows,
            "identities": pairs.identities,
            "values": pairs.values,
            "lines": lines,
        }
        for name, values in named.items():
            self._sink(name, values)

    def add_left_out(self, read: ReadCounts) -> None:
        """Adds the invalid rows, after all chunks."""
        self.bad_rows = [*read.bad_rows, *self.bad_rows]
        self.counts.update(rows=read.dropped_bad_rows, dropped_bad_rows=read.dropped_bad_rows)
        if self.counts["rows"] > self._next_row:
            self._sink("lines", np.zeros(self.counts["rows"] - self._next_row, dtype=np.int64))

    def report(self, path: str) -> DataReport:
        """The report, with the fingerprint: sha256 of settings, all tokens, offsets and rows, and of weights and rewards where
        a row has one. It is the same from a file or from the cache, for any size of chunks."""
        values = np.concatenate([np.empty(0), *self._values]).reshape(-1, 3)
        has_values = bool((values[:, 0] != 1).any() or not np.isnan(values[:, 1:]).all())
        for array in (*self._offsets, *self._rows, *([values.ravel()] if has_values else [])):
            self._add_to_digest(array)
        known: dict[str, Any] = {
            "path": path,
            "with_chat_template": self._with_chat_template,
            "first_bad_row": str(self.bad_rows[0]) if self.bad_rows else "",
            "max_token_id": self._largest,
            "fingerprint": self._digest.hexdigest(),
        }
        return DataReport(**({one.name: self.counts[one.name] for one in fields(DataReport)} | known))

    def _add_to_digest(self, array: npt.NDArray[Any]) -> None:
        little_endian = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        self._digest.update(little_endian.view(np.uint8).data)


class _Progress:
    """Prints progress to stderr while a large file is tokenised."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._started = self._said = time.monotonic()

    def at(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            rate = rows / (now - self._started)
            print(f"{self._path}: {rows:,} rows tokenised, {rate:,.0f} per second", file=sys.stderr, flush=True)


def _nothing_left(path: str, settings: DataSettings, rows: int) -> Problem:
    return Problem(
        where=path,
        value=f"{rows} pairs, all longer than {settings.max_total_sequence_length} tokens",
        expected="at least one pair",
        fix="raise policy.max_total_sequence_length, or set data.on_too_long: truncate",
    )
