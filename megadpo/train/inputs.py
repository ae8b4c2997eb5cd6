"""Opens what a run needs: model folders, tokenizer and data. For training, evaluation, --check, data
inspection and the planner."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from megadpo.config.architecture import Architecture
from megadpo.config.grid import Grid
from megadpo.config.problems import Attempts, ConfigError, Problem
from megadpo.config.schema import HOLDOUT, Config
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.chosen import hold_out
from megadpo.data.pairs import OpenedPairs
from megadpo.data.tokens.dataset import load_datasets
from megadpo.data.tokens.tokenizer import load_tokenizer, pad_token_id
from megadpo.families import read_architecture, weight_table
from megadpo.model.source import ModelSource, reference_source, resolve_source, tokenizer_source
from megadpo.train.handed_on import old_tokenizer_notes, tokenizer_notes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN = ""
"""Key of the training set. The other keys are the names in data.val_data_paths, which are never empty, and HOLDOUT."""
REFERENCE = "dpo.reference.model_name"


@dataclass(frozen=True)
class RunModels:
    """The models by their folders, without weights."""

    source: ModelSource
    arch: Architecture
    """The policy's."""
    reference: ModelSource
    """`source` itself if dpo.reference.model_name is null."""
    reference_arch: Architecture


@dataclass(frozen=True)
class RunInputs(RunModels):
    """The models, the tokenised pairs and their loaders."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_notes: list[str]
    """A line if tokenizer, template or EOS differ from the model folder's, and one if they may differ from those that the
    model was trained with."""
    loaders: Mapping[str, GlobalBatchLoader]
    """Name of the set -> loader, TRAIN first. Each has its pairs (`.dataset`)."""

    @property
    def train_loader(self) -> GlobalBatchLoader:
        return self.loaders[TRAIN]

    @property
    def validation(self) -> dict[str, GlobalBatchLoader]:
        """The sets of data.val_data_paths, and HOLDOUT."""
        return {name: loader for name, loader in self.loaders.items() if name != TRAIN}

    @property
    def reports(self) -> list[str]:
        """The tokenizer's notes; a line for each file with its read, dropped and truncated pairs; the pairs that an epoch
        leaves out."""
        lines = [*self.tokenizer_notes]
        lines += [str(report) for loader in self.loaders.values() for report in loader.dataset.reports]
        lines += self.train_loader.mixture if TRAIN in self.loaders else []
        for loader in self.loaders.values():
            if dropped := loader.dropped_per_epoch:
                path, size = loader.dataset.report.path, loader.options.global_batch_size
                lines.append(
                    f"{path}: {dropped} {loader.unit} of each epoch are left out: they don't fill a global batch of {size}"
                )
        return lines


def open_models(cfg: Config, *, weights: bool = True) -> RunModels:
    """Find the models; the folders need nothing but config.json. weights: also download a hub model's weights.

    Raises ConfigError with every problem of both."""
    attempt = Attempts()
    found = _models(cfg, attempt, weights)
    attempt.refuse()
    return RunModels(*found)


def open_run_inputs(
    cfg: Config,
    grid: Grid | None = None,
    *,
    sets: Collection[str] | None = None,
    weights: bool = True,
    thorough: bool = False,
) -> RunInputs:
    """Finds the models, reads and tokenises the data, and makes loaders of this rank's part (grid None: of everything).

    sets: names of the sets to open; None: TRAIN and all of data.val_data_paths. weights: also download a hub model's
    weights. thorough: compare the headers of local weight files with the model's shape, and read the rows of the data even if
    there is no tokenizer. Raises UserError with every problem of all parts. Collectives: none.
    """
    held_out = cfg.data.holdout is not None and (sets is None or HOLDOUT in sets or TRAIN in sets)
    paths: dict[str, str | Sequence[str]] = {TRAIN: cfg.data.train_paths, **(cfg.data.val_data_paths or {})}
    paths = {
        name: given for name, given in paths.items() if sets is None or name in sets or (name == TRAIN and held_out)
    }
    attempt = Attempts()
    source, arch, reference, reference_arch = _models(cfg, attempt, weights)
    tokenizer = None if source is None else attempt(lambda: load_tokenizer(str(tokenizer_source(cfg, source))))
    if thorough:
        for one, shape in {source: arch, reference: reference_arch}.items():
            if one is not None and shape is not None:
                attempt(partial(_require_complete_weights, one, shape))
        if arch is None or tokenizer is None:
            attempt(lambda: _read_rows(cfg, paths.values()))
    datasets = loaders = None
    if arch is not None and tokenizer is not None:
        datasets = attempt(lambda: _datasets(cfg, paths, tokenizer, arch, sets))
        if datasets is not None:
            loaders = attempt(lambda: _loaders(cfg, arch, datasets, pad_token_id(tokenizer), grid or Grid()))
    if datasets is not None and reference_arch is not None and reference != source:
        attempt(lambda: _require_vocabulary(cfg, reference_arch, datasets.values()))
    attempt.refuse()
    assert source and arch and reference and reference_arch and tokenizer is not None and loaders is not None
    notes = tokenizer_notes(cfg, source.hf_files, tokenizer)
    notes += old_tokenizer_notes(source.megatron) if source.megatron is not None else []
    return RunInputs(source, arch, reference, reference_arch, tokenizer, notes, loaders)


def _datasets(
    cfg: Config,
    paths: Mapping[str, str | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    arch: Architecture,
    sets: Collection[str] | None,
) -> dict[str, OpenedPairs]:
    """The sets that are asked for, with HOLDOUT taken out of TRAIN where the config says so."""
    datasets = load_datasets(cfg, paths, tokenizer, arch)
    if cfg.data.holdout is not None and TRAIN in datasets:
        datasets[TRAIN], datasets[HOLDOUT] = hold_out(datasets[TRAIN], cfg.data.holdout)
    return {name: pairs for name, pairs in datasets.items() if sets is None or name in sets}


def _models(cfg: Config, attempt: Attempts, weights: bool) -> tuple[Any, ...]:
    """The fields of RunModels; None for what `attempt` has problems of."""
    source = attempt(lambda: resolve_source(cfg.policy.model_name, "policy.model_name", weights=weights))
    if source is None:
        return None, None, None, None
    arch = attempt(lambda: read_architecture(source.hf_files))
    reference = attempt(lambda: reference_source(cfg, source, weights=weights))
    other = None if reference == source else reference
    return (
        source,
        arch,
        reference,
        arch if other is None else attempt(lambda: read_architecture(other.hf_files, REFERENCE)),
    )


def _loaders(
    cfg: Config, arch: Architecture, datasets: Mapping[str, OpenedPairs], pad: int, grid: Grid
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


def _require_vocabulary(cfg: Config, reference_arch: Architecture, datasets: Iterable[OpenedPairs]) -> None:
    """Raises ConfigError if the reference's vocabulary lacks token ids of the pairs. With tensor parallelism no shard of
    the embedding would have them, and log-probabilities would be wrong without an error."""
    vocab_size, largest = reference_arch.vocab_size, max(data.max_token_id for data in datasets)
    if largest >= vocab_size:
        expected = (
            f"a model with more than {largest} token ids, the largest in the data; its vocabulary has {vocab_size}"
        )
        fix = "name a model with the policy's tokenizer"
        raise ConfigError(Problem(REFERENCE, cfg.dpo.reference.model_name, expected, fix))


def _require_complete_weights(source: ModelSource, arch: Architecture) -> None:
    """Raises ConfigError if the weight files of a Hugging Face folder lack tensors of the model. Reads only headers. The hub's
    folders are passed over: their weights may not be there yet."""
    from megadpo.model.weights.hf_folder import HfWeights

    if source.megatron is not None or source.from_hub:
        return
    table = weight_table(arch)
    if problems := HfWeights.open(source.hf_files, table).problems(table):
        raise ConfigError(problems)


def _read_rows(cfg: Config, sources: Iterable[str | Sequence[str]]) -> None:
    """Raises DataError with every problem of the rows that can be found without a tokenizer."""
    from megadpo.data.formats.read_pairs import read_pairs

    attempt = Attempts()
    for path in (path for given in sources for path in ([given] if isinstance(given, str) else given)):
        pairs = read_pairs(
            path, cfg.data.format_options, dataset_name=cfg.data.dataset_name, on_bad_row=cfg.data.on_bad_row
        )
        attempt(partial(deque, pairs, maxlen=0))  # reads all and keeps none
    attempt.refuse()
