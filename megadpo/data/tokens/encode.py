"""A data file -> token ids, a chunk of pairs at a time, in several processes, in memory that doesn't grow with it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.data.pairs import PreferencePair, TokenizedPair, largest_id
from megadpo.data.sources.rows import MOST_PROBLEMS, ReadCounts, iterate_pairs
from megadpo.data.tokens.arrays import DataReport, DataSettings, Fingerprint, TokenArrays
from megadpo.data.tokens.limit import TooLong, apply_limit, too_long_problems
from megadpo.data.tokens.tokenization import PairTokenizer
from megadpo.data.tokens.workers import ordered_map

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_PAIRS = 1024
ALONE_CHUNKS = 8
"""Chunks that are tokenised before other processes are started, which takes seconds: most files need none."""

_PROGRESS_S = 10.0


class Sink(Protocol):
    """Takes a file's arrays in pieces: 'tokens', 'offsets', 'rows' and 'lines', each in order."""

    def append(self, name: str, values: npt.NDArray[Any]) -> None: ...


class MemorySink:
    """Keeps them."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[npt.NDArray[Any]]] = {}

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        self._pieces.setdefault(name, []).append(values)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The pieces of one array, joined."""
        return np.concatenate(self._pieces.pop(name))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is known of a file besides its arrays."""

    report: DataReport
    fingerprint: str
    max_token_id: int


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some consecutive pairs of the file, tokenised."""

    arrays: TokenArrays
    first_row: int
    lines: npt.NDArray[np.int64]
    """Line of each row from first_row to that of the last pair; 0 for rows that were left out."""
    counts: Counter[str]
    """Under the names of DataReport's fields."""
    too_long: list[tuple[str, int]]
    """file:line and tokens of each pair over the limit, where those are refused; there are no arrays then."""
    problems: list[Problem]
    bad_pairs: list[Problem]
    """What is wrong with pairs that were left out, the first of them."""


class _ChunkEncoder:
    """Tokenises a chunk and holds it to the limit. Pickled for other processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> None:
        self._settings = settings
        self.encoder = pair_tokenizer(tokenizer, settings)

    def __call__(self, pairs: Sequence[PreferencePair]) -> Chunk:
        try:
            tokenized = self.encoder.encode(pairs, on_bad_row=self._settings.on_bad_row)
        except DataError as error:
            return _chunk([], pairs, problems=error.problems)
        limit = self._settings.max_total_sequence_length
        sources = tokenized.sources
        if self._settings.on_too_long == "refuse":
            lengths = [pair.longest_sequence_tokens for pair in tokenized.pairs]
            too_long = [(source, length) for source, length in zip(sources, lengths, strict=True) if length > limit]
            if too_long:
                return _chunk([], pairs, too_long=too_long)
        limited = apply_limit(
            tokenized.pairs,
            max_tokens=limit,
            on_too_long=self._settings.on_too_long,
            sources=sources,
            bos_token_id=self.encoder.tokenizer.bos_token_id,
        )
        return _chunk(
            limited.pairs,
            pairs,
            tokenized_apart=tokenized.tokenized_apart,
            dropped_too_long=limited.dropped_too_long,
            truncated=limited.truncated,
            dropped_equal_after_truncation=limited.dropped_equal_after_truncation,
            dropped_unanswered_after_truncation=limited.dropped_unanswered_after_truncation,
            dropped_bad_rows=tokenized.dropped_bad_pairs,
            bad_pairs=tokenized.bad_pairs,
        )


def _chunk(
    kept: Sequence[TokenizedPair],
    pairs: Sequence[PreferencePair],
    *,
    too_long: list[tuple[str, int]] | None = None,
    problems: list[Problem] | None = None,
    bad_pairs: list[Problem] | None = None,
    **counts: int,
) -> Chunk:
    arrays = TokenArrays.of(kept)
    prompt, chosen, rejected = arrays.text_tokens().sum(axis=0).tolist()
    counts |= {"prompt_tokens": prompt, "chosen_tokens": chosen, "rejected_tokens": rejected}
    first_row = pairs[0].row
    lines = np.zeros(pairs[-1].row + 1 - first_row, dtype=np.int64)
    lines[[pair.row - first_row for pair in pairs]] = [pair.line for pair in pairs]
    return Chunk(
        arrays=arrays,
        first_row=first_row,
        lines=lines,
        counts=Counter(rows=len(pairs), pairs=len(kept), **counts),
        too_long=too_long or [],
        problems=problems or [],
        bad_pairs=bad_pairs or [],
    )


def pair_tokenizer(tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> PairTokenizer:
    """The tokenizer under these settings. Raises ConfigError for an unusable tokenizer or template."""
    return PairTokenizer(
        tokenizer,
        chat_template=settings.chat_template,
        chat_template_kwargs=settings.chat_template_kwargs,
        loss_on=settings.loss_on,
    )


def settings_text(settings: DataSettings, encoder: PairTokenizer) -> str:
    """What the fingerprint says of the settings: those that decide tokens, not where they were read from."""
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


def encode_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    sink: Sink,
    num_workers: int = 1,
    show_progress: bool = False,
) -> Summary:
    """Reads and tokenises a file into `sink`, in file order whatever the number of processes.

    show_progress: a line on stderr every 10 s.
    Raises DataError for everything wrong with the file, ConfigError for an unusable tokenizer or template, and where a
    process of several died.
    """
    encode = _ChunkEncoder(tokenizer, settings)
    reading = _Reading(path, settings)
    result = _Result(sink, settings_text(settings, encode.encoder))
    progress = _Progress(str(path)) if show_progress else None
    for chunk in ordered_map(encode, reading.chunks(), num_workers=num_workers, alone=ALONE_CHUNKS):
        result.add(chunk)
        if len(result.problems) >= MOST_PROBLEMS:
            raise DataError(result.problems[:MOST_PROBLEMS])
        if progress is not None:
            progress.at(result.counts["rows"])
    problems = [
        *reading.problems,
        *result.problems,
        *too_long_problems(result.too_long, settings.max_total_sequence_length),
    ]
    result.add_left_out(reading.counts)
    if not problems and result.counts["pairs"] == 0:
        problems = result.bad_rows or [_nothing_left(str(path), settings, result.counts["rows"])]
    if problems:
        raise DataError(problems)
    return result.summary(str(path), with_chat_template=encode.encoder.chat_template is not None)


class _Reading:
    """The pairs of a file in chunks; what is wrong with it is kept for the end, so that all is reported at once."""

    def __init__(self, path: str | Path, settings: DataSettings) -> None:
        self._path = path
        self._settings = settings
        self.problems: list[Problem] = []
        self.counts = ReadCounts()

    def chunks(self) -> Iterator[list[PreferencePair]]:
        pairs = self._pairs()
        while chunk := list(islice(pairs, CHUNK_PAIRS)):
            yield chunk

    def _pairs(self) -> Iterator[PreferencePair]:
        try:
            yield from iterate_pairs(
                self._path,
                self._settings.keys,
                dataset_name=self._settings.dataset_name,
                on_bad_row=self._settings.on_bad_row,
                counts=self.counts,
            )
        except DataError as error:
            self.problems = error.problems


class _Result:
    """What the chunks of a file add up to."""

    def __init__(self, sink: Sink, settings_text: str) -> None:
        self.problems: list[Problem] = []
        self.too_long = TooLong()
        self.counts: Counter[str] = Counter()
        self.bad_rows: list[Problem] = []
        self._next_row = 0
        self._sink = sink
        self._fingerprint = Fingerprint(settings_text)
        self._offsets = [np.zeros(1, dtype=np.int64)]
        self._rows: list[npt.NDArray[np.int64]] = []
        self._largest = 0
        sink.append("offsets", self._offsets[0])

    def add(self, chunk: Chunk) -> None:
        """The next chunk of the file. Once something is wrong, only problems are added."""
        self.problems += chunk.problems
        self.too_long.add(chunk.too_long)
        self.counts.update(chunk.counts)
        self.bad_rows += chunk.bad_pairs[: MOST_PROBLEMS - len(self.bad_rows)]
        if self.problems or self.too_long.count:
            return
        arrays = chunk.arrays
        offsets = arrays.offsets[1:] + self._offsets[-1][-1:]
        if len(arrays):
            self._offsets.append(offsets)
            self._rows.append(arrays.rows)
            self._fingerprint.add(arrays.tokens)
            self._largest = max(self._largest, largest_id(arrays.tokens))
        lines = np.concatenate([np.zeros(chunk.first_row - self._next_row, dtype=np.int64), chunk.lines])
        self._next_row += len(lines)
        named = {"tokens": arrays.tokens, "offsets": offsets, "rows": arrays.rows, "lines": lines}
        for name, values in named.items():
            self._sink.append(name, values)

    def add_left_out(self, read: ReadCounts) -> None:
        """The rows that no pair was read from, once all chunks are there."""
        self.bad_rows = [*read.bad_rows, *self.bad_rows]
        self.counts.update(rows=read.dropped_bad_rows, dropped_bad_rows=read.dropped_bad_rows)
        if self.counts["rows"] > self._next_row:
            self._sink.append("lines", np.zeros(self.counts["rows"] - self._next_row, dtype=np.int64))

    def summary(self, path: str, *, with_chat_template: bool) -> Summary:
        for array in (*self._offsets, *self._rows):
            self._fingerprint.add(array)
        counts = {
            field.name: self.counts[field.name]
            for field in dataclasses.fields(DataReport)
            if field.name not in ("path", "with_chat_template", "first_bad_row")
        }
        first_bad_row = str(self.bad_rows[0]) if self.bad_rows else ""
        return Summary(
            report=DataReport(path=path, with_chat_template=with_chat_template, first_bad_row=first_bad_row, **counts),
            fingerprint=self._fingerprint.hexdigest(),
            max_token_id=self._largest,
        )


class _Progress:
    """Lines on stderr while a large file is tokenised."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._started = self._said = time.monotonic()

    def at(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._said >= _PROGRESS_S:
            self._said = now
            rate = rows / (now - self._started)
            print(f"{self._path}: {rows:,} rows tokenised, {rate:,.0f} a second", file=sys.stderr, flush=True)


def _nothing_left(path: str, settings: DataSettings, rows: int) -> Problem:
    return Problem(
        where=path,
        value=f"no pair left of {rows}: all are longer than {settings.max_total_sequence_length} tokens",
        expected="at least one pair",
        fix="raise policy.max_total_sequence_length, or set data.on_too_long: truncate",
    )
