"""What a run starts from: model folders, tokenizer and data. Training, evaluation, --check and inspection open it here."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from megadpo.config.architecture import Architecture
from megadpo.config.grid import Grid
from megadpo.config.problems import Attempts, ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.pairs import PairDataset
from megadpo.data.tokens.dataset import load_datasets
from megadpo.data.tokens.tokenizer import load_tokenizer, pad_token_id
from megadpo.families import read_architecture, weight_table
from megadpo.model.source import ModelSource, reference_source, resolve_source, tokenizer_source
from megadpo.train.handed_on import tokenizer_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN = ""
"""Stands for the training set among the names of data.val_data_paths, none of which is empty."""
REFERENCE = "dpo.reference.model_name"


@dataclass(frozen=True)
class RunInputs:
    """Models by their folders, without weights; the pairs, tokenised, and the loaders over them."""

    source: ModelSource
    arch: Architecture
    """The policy's."""
    reference: ModelSource
    """`source` itself where dpo.reference.model_name is null."""
    reference_arch: Architecture
    tokenizer: PreTrainedTokenizerBase
    tokenizer_notes: list[str]
    """A line where tokenizer, template or EOS are not the model folder's own."""
    loaders: Mapping[str, GlobalBatchLoader]
    """By the name of the set, TRAIN first; each holds its pairs (`.dataset`)."""

    @property
    def train_loader(self) -> GlobalBatchLoader:
        return self.loaders[TRAIN]

    @property
    def validation(self) -> dict[str, GlobalBatchLoader]:
        """The sets of data.val_data_paths."""
        return {name: loader for name, loader in self.loaders.items() if name != TRAIN}

    @property
    def reports(self) -> list[str]:
        """The tokenizer's notes; one line a file, what was read, dropped and truncated; and what an epoch leaves out."""
        lines = [*self.tokenizer_notes]
        lines += [str(loader.dataset.report) for loader in self.loaders.values()]
        for loader in self.loaders.values():
            if dropped := loader.dropped_pairs_per_epoch:
                path, size = loader.dataset.report.path, loader.global_batch_size
                lines.append(
                    f"{path}: {dropped} pairs an epoch don't fill a last global batch of {size} and are left out"
                )
        return lines


def open_run_inputs(
    cfg: Config,
    grid: Grid | None = None,
    *,
    sets: Collection[str] | None = None,
    weights: bool = True,
    thorough: bool = False,
) -> RunInputs:
    """Find the models, read and tokenise the data, and deal it out: to the rank of `grid` its part (None: everything).

    sets: names of the sets to open; None: TRAIN and all of data.val_data_paths. weights: also download a hub model's
    weights. thorough: hold the weight files' headers against the model's shape, and read the rows of the data even where
    there is no tokenizer for them. Raises UserError with every problem of all parts. Collectives: none.
    """
    paths = {TRAIN: cfg.data.train_data_path, **(cfg.data.val_data_paths or {})}
    paths = {name: path for name, path in paths.items() if sets is None or name in sets}
    attempt = Attempts()
    source = attempt(lambda: resolve_source(cfg.policy.model_name, "policy.model_name", weights=weights))
    if source is None:
        arch = tokenizer = reference = reference_arch = None
    else:
        arch = attempt(lambda: read_architecture(source.hf_files))
        tokenizer = attempt(lambda: load_tokenizer(str(tokenizer_source(cfg, source))))
        reference = attempt(lambda: reference_source(cfg, source, weights=weights))
        other = None if reference == source else reference
        reference_arch = arch if other is None else attempt(lambda: read_architecture(other.hf_files, REFERENCE))
    if thorough:
        for one, shape in {source: arch, reference: reference_arch}.items():
            if one is not None and shape is not None:
                attempt(partial(_require_complete_weights, one, shape))
        if arch is None or tokenizer is None:
            attempt(lambda: _read_rows(cfg, paths.values()))
    datasets = loaders = None
    if arch is not None and tokenizer is not None:
        datasets = attempt(lambda: load_datasets(cfg, paths, tokenizer, arch.vocab_size))
        if datasets is not None:
            loaders = attempt(lambda: _loaders(cfg, arch, datasets, pad_token_id(tokenizer), grid or Grid()))
    if datasets is not None and reference_arch is not None and reference != source:
        attempt(lambda: _require_vocabulary(cfg, reference_arch, datasets.values()))
    attempt.refuse()
    assert source and arch and reference and reference_arch and tokenizer is not None and loaders is not None
    notes = tokenizer_notes(cfg, source.hf_files, tokenizer)
    return RunInputs(source, arch, reference, reference_arch, tokenizer, notes, loaders)


def _loaders(
    cfg: Config, arch: Architecture, datasets: Mapping[str, PairDataset], pad: int, grid: Grid
) -> dict[str, GlobalBatchLoader]:
    attempt = Attempts()
    loaders = {}
    for name, data in datasets.items():
        open_one = partial(GlobalBatchLoader.from_config, data, cfg, arch)
        made = attempt(partial(open_one, pad_token_id=pad, training=name == TRAIN, grid=grid))
        if made is not None:
            loaders[name] = made
    attempt.refuse()
    return loaders


def _require_vocabulary(cfg: Config, reference_arch: Architecture, datasets: Iterable[PairDataset]) -> None:
    """Raises ConfigError for a reference that lacks some of the pairs' tokens: under tensor parallelism no shard of its
    embedding would hold them, and its log-probabilities would be wrong without an error."""
    vocab_size, largest = reference_arch.vocab_size, max(data.max_token_id for data in datasets)
    if largest >= vocab_size:
        expected = f"a model that has the pairs' token ids, up to {largest}; its vocabulary has {vocab_size}"
        raise ConfigError(
            Problem(REFERENCE, cfg.dpo.reference.model_name, expected, "name one with the policy's tokenizer")
        )


def _require_complete_weights(source: ModelSource, arch: Architecture) -> None:
    """Raises ConfigError for a Hugging Face folder whose files don't hold the model's tensors, by their headers."""
    from megadpo.model.weights.hf_folder import HfWeights

    if source.megatron is not None:
        return
    table = weight_table(arch)
    if problems := HfWeights.open(source.hf_files, table).problems(table):
        raise ConfigError(problems)


def _read_rows(cfg: Config, paths: Iterable[str]) -> None:
    """Raises DataError with every problem that the rows have without a tokenizer."""
    from megadpo.data.formats.read_pairs import read_pairs

    attempt = Attempts()
    for path in paths:
        pairs = read_pairs(
            path, cfg.data.format_options, dataset_name=cfg.data.dataset_name, on_bad_row=cfg.data.on_bad_row
        )
        attempt(partial(deque, pairs, maxlen=0))  # reads all, keeps none
    attempt.refuse()
