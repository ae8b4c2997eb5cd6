"""A data file as a sequence of tokenised pairs, held flat: mapped from the cache, or in memory. 4 bytes a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.data.pairs import TokenizedPair
from megadpo.data.tokens.arrays import DataReport, DataSettings, TokenArrays, TokenizedFile
from megadpo.data.tokens.cache import TokenCache
from megadpo.data.tokens.cache_key import cache_key
from megadpo.data.tokens.encode import MemorySink, Sink, Summary, encode_file
from megadpo.data.tokens.workers import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadpo.config.schema import Config

__all__ = ["DataReport", "DataSettings", "PairDataset", "TokenArrays", "TokenizedPairs", "load_datasets"]


class TokenizedPairs(Sequence[TokenizedPair]):
    """N pairs, what became of the file's other rows, and a fingerprint of it all."""

    def __init__(self, file: TokenizedFile) -> None:
        self.arrays = file.arrays
        self.report = file.report
        self._lines = file.lines  # int64 [rows of the file]
        self.fingerprint = file.fingerprint
        """sha256 over the tokens, their rows and the settings; the file's name and place don't matter."""
        self.max_token_id = file.max_token_id
        """The largest token id, to hold against the model's vocabulary."""
        self.release = file.release
        """Gives token ids that are mapped from the cache back to the kernel; they stay readable."""

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

    def packed_tokens(self, *, share_prompt: bool) -> npt.NDArray[np.int64]:
        """int64 [N]: tokens that each pair takes in a pack."""
        return self.arrays.text_tokens() @ np.array([1 if share_prompt else 2, 1, 1], dtype=np.int64)

    def source_of(self, row: int) -> str:
        """`file:line` of a row of the file, for messages about a pair by its index."""
        return f"{self.report.path}:{self._lines[row]}"


class PairDataset(TokenizedPairs):
    """The pairs of one file under a run's config."""

    def __init__(self, cfg: Config, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
        """Mapped from `data.cache_dir`, and tokenised there first where they are not in it yet.

        Raises DataError for everything wrong with the file, ConfigError for an unusable tokenizer, template or cache.
        """
        cache = None if cfg.data.cache_dir is None else TokenCache(cfg.data.cache_dir)
        workers = cfg.data.num_tokenize_workers or usable_cores()
        super().__init__(tokenized_file(path, tokenizer, DataSettings.from_config(cfg), cache, num_workers=workers))

    @classmethod
    def with_settings(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: DataSettings,
        *,
        cache: TokenCache | None = None,
        num_workers: int = 1,
    ) -> PairDataset:
        """The same without a config; by default without a cache."""
        dataset = cls.__new__(cls)
        TokenizedPairs.__init__(dataset, tokenized_file(path, tokenizer, settings, cache, num_workers=num_workers))
        return dataset


def load_datasets(
    cfg: Config, paths: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> dict[str, PairDataset]:
    """Name -> pairs of each file. Raises DataError with every problem of every file."""
    datasets: dict[str, PairDataset] = {}
    problems: list[Problem] = []
    for name, path in paths.items():
        try:
            datasets[name] = PairDataset(cfg, tokenizer, path)
        except DataError as error:
            problems += error.problems
            continue
        largest = datasets[name].max_token_id
        if largest >= vocab_size:
            expected = f"token ids below the model's vocabulary of {vocab_size}"
            problems.append(Problem(path, largest, expected, "use the tokenizer of this model (policy.tokenizer.name)"))
    if problems:
        raise DataError(problems)
    return datasets


def tokenized_file(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    cache: TokenCache | None,
    *,
    num_workers: int,
) -> TokenizedFile:
    """The file from the cache, or into the cache and then from it; without a cache into memory, by this process alone,
    since then each process of a machine does the same. Raises DataError and ConfigError."""
    if cache is not None:
        key = cache_key(path, tokenizer, settings)

        def build(sink: Sink) -> Summary:
            made = encode_file(path, tokenizer, settings, sink=sink, num_workers=num_workers, show_progress=True)
            if cache_key(path, tokenizer, settings) != key:
                raise DataError(_changed_meanwhile(str(path)))
            return made

        return cache.open_or_build(key, str(path), build)
    sink = MemorySink()
    made = encode_file(path, tokenizer, settings, sink=sink)
    return TokenizedFile(
        arrays=TokenArrays(sink.array("tokens"), sink.array("offsets"), sink.array("rows")),
        lines=sink.array("lines"),
        report=made.report,
        fingerprint=made.fingerprint,
        max_token_id=made.max_token_id,
    )


def _changed_meanwhile(path: str) -> Problem:
    return Problem(
        where=path,
        value="a file that changed while it was read",
        expected="the same content from the first read to the last",
        fix="start again when nothing writes to it any more",
    )
