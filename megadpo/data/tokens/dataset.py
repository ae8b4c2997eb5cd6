"""Loads the data sets of a run: from the cache, or tokenised into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import DataError, Problem
from megadpo.data.chosen import ChosenPairs
from megadpo.data.pairs import DataReport, OpenedPairs, PairDataset
from megadpo.data.sources.rows import source_digest
from megadpo.data.tokens.cache import TokenCache
from megadpo.data.tokens.cache_key import cache_key
from megadpo.data.tokens.encode import DataSettings, Sink, encode_source
from megadpo.data.tokens.workers import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megadpo.config.architecture import Architecture
    from megadpo.config.schema import Config


def load_datasets(
    cfg: Config, paths: Mapping[str, str | Sequence[str]], tokenizer: PreTrainedTokenizerBase, arch: Architecture
) -> dict[str, OpenedPairs]:
    """Name -> pairs of each set, whose sources are one or several, mapped from `data.cache_dir`. Sources that are not there
    yet are tokenised first.

    Raises DataError with every problem of every source, ConfigError for an unusable tokenizer, template or cache.
    """
    cache = None if cfg.data.cache_dir is None else TokenCache(cfg.data.cache_dir)
    workers = cfg.data.num_tokenize_workers or usable_cores()
    settings = DataSettings.from_config(cfg, arch.media_tokens)
    opened: dict[str, PairDataset] = {}
    problems: list[Problem] = []
    sources = {name: [given] if isinstance(given, str) else given for name, given in paths.items()}
    for path in dict.fromkeys(path for several in sources.values() for path in several):
        try:
            opened[path] = open_dataset(path, tokenizer, settings, cache=cache, num_workers=workers)
        except DataError as error:
            problems += error.problems
            continue
        largest = opened[path].max_token_id
        if largest >= arch.vocab_size:
            expected = f"token ids below the model's vocabulary of {arch.vocab_size}"
            problems.append(Problem(path, largest, expected, "use the tokenizer of this model (policy.tokenizer.name)"))
    if problems:
        raise DataError(problems)
    sets = {name: [opened[path] for path in several] for name, several in sources.items()}
    return {name: several[0] if len(several) == 1 else ChosenPairs.of(several) for name, several in sets.items()}


def open_dataset(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    *,
    cache: TokenCache | None = None,
    num_workers: int = 1,
) -> PairDataset:
    """The source from the cache, after it has been written there if necessary. Without a cache the source is tokenised
    into memory, in this process only, because every process of the node does it. Raises DataError and ConfigError."""
    path = str(path)
    if cache is not None:
        digest = cache.source_digest(path)

        def build(sink: Sink) -> DataReport:
            made = encode_source(path, tokenizer, settings, sink=sink, num_workers=num_workers, show_progress=True)
            if source_digest(path) != digest:
                got, fix = "a file that changed while it was read", "start again when nothing writes to it any more"
                raise DataError(Problem(path, got, "the same content from the first read to the last", fix))
            return made

        return cache.open_or_build(cache_key(digest, tokenizer, settings), path, build)
    pieces: dict[str, list[npt.NDArray[Any]]] = defaultdict(list)
    report = encode_source(path, tokenizer, settings, sink=lambda name, values: pieces[name].append(values))
    arrays: dict[str, Any] = {name: np.concatenate(values) for name, values in pieces.items()}
    return PairDataset(**arrays, report=report)
