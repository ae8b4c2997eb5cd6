"""`launch/train.py --check`: everything that can be said about a run without its weights, all at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError, DataError, Problem, UserError
from megadpo.config.schema import Config
from megadpo.families import read_architecture

if TYPE_CHECKING:
    from megadpo.model.source import ModelSource

Made = TypeVar("Made")


def check(path: str, overrides: Sequence[str], checked_config: Callable[[], Config]) -> int:
    """Print what the data files hold and the number of steps.

    checked_config: loads the config and holds it against model folder and layout. Raises ConfigError: the config's
    problems first, since it says where the rest is, then those of model folder, layout, weight files and data together.
    """
    from megadpo.data.batches.loader import DataRank
    from megadpo.data.tokens.tokenizer import load_tokenizer
    from megadpo.model.source import reference_source, resolve_source, tokenizer_source
    from megadpo.train.setup import RunData, load_data

    problems: list[Problem] = []

    def attempt(make: Callable[[], Made]) -> Made | None:
        try:
            return make()
        except UserError as error:
            problems.extend(one for one in error.problems if one not in problems)
            return None

    cfg = load_config(path, overrides)
    cfg = attempt(checked_config) or cfg
    source = attempt(lambda: resolve_source(cfg.policy.model_name, "policy.model_name"))
    arch = None if source is None else attempt(lambda: read_architecture(source.hf_files))
    tokenizer = None if source is None else attempt(lambda: load_tokenizer(str(tokenizer_source(cfg, source))))
    data: RunData | None = None
    if source is not None and arch is not None:
        reference = attempt(lambda: reference_source(cfg, source)) or source
        for one in dict.fromkeys((source, reference)):
            problems += _weight_problems(one)
    if source is None or arch is None or tokenizer is None:
        attempt(lambda: _read_rows(cfg))
    else:
        data = attempt(lambda: load_data(cfg, arch, source, DataRank()))
    if problems or data is None:
        raise ConfigError(problems)
    for line in [*cfg.notes, *data.reports]:
        print(line)
    print(f"{cfg.dpo.total_steps(data.train_loader.batches_per_epoch)} steps; no problem found")
    return 0


def _weight_problems(source: ModelSource) -> list[Problem]:
    """Weight files complete, by their headers."""
    from megadpo.families import weight_table
    from megadpo.model.weights.hf_folder import HfWeights

    if source.megatron is not None:
        return []
    try:
        table = weight_table(read_architecture(source.hf_files))
        return list(HfWeights.open(source.hf_files, table).problems(table))
    except UserError as error:
        return error.problems


def _read_rows(cfg: Config) -> None:
    """The data files without a tokenizer, where there is none. Raises DataError."""
    from megadpo.data.formats import FieldKeys
    from megadpo.data.formats.read_pairs import read_pairs

    problems: list[Problem] = []
    keys = FieldKeys(cfg.data.prompt_key, cfg.data.chosen_key, cfg.data.rejected_key)
    for path in (cfg.data.train_data_path, *(cfg.data.val_data_paths or {}).values()):
        pairs = read_pairs(path, keys, dataset_name=cfg.data.dataset_name, on_bad_row=cfg.data.on_bad_row)
        try:
            for _ in pairs:
                pass
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
