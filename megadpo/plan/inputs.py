"""Reads the inputs of a plan: config.json of the config's models, without weights, and the lengths of its pairs."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.architecture import Architecture
from megadpo.config.data_source import parse_source
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.data.batches.groups import PairGroups
from megadpo.plan.packs import stated_pairs
from megadpo.train.inputs import TRAIN, open_models, open_run_inputs


def architectures(cfg: Config) -> tuple[Architecture, Architecture | None]:
    """The policy's, and the reference's where it runs in every step: beside the policy, or as the policy without its
    adapters. Raises ConfigError with every problem of both."""
    models = open_models(cfg, weights=False)
    return models.arch, models.reference_arch if cfg.dpo.reference.mode in ("resident", "adapter_off") else None


def choose_pairs(cfg: Config, stated: str | None) -> tuple[PairGroups, str]:
    """The lengths of the pairs in the order of the first epoch, with what they share, and where they are from.

    `stated` ("512,256,256": prompt and answers) goes before the data; without either, every pair is as long as the config
    allows. Raises UserError for text that states no lengths, and for data that exists but can't be read.
    """
    if stated is not None:
        return stated_pairs(cfg, _parse(stated))
    sources = [parse_source(path) for path in cfg.data.train_paths]
    if not all(Path(source.path).exists() for source in sources):  # a hub name would be downloaded
        return stated_pairs(cfg, None)
    return _read(cfg)


def _parse(stated: str) -> list[int]:
    parts = stated.split(",")
    if len(parts) < 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        fix = "for example --lengths 512,256,256"
        expected = "three whole numbers above 0: prompt,chosen,rejected (or further answers to the same prompt)"
        raise ConfigError(Problem("--lengths", stated, expected, fix))
    return [int(part) for part in parts]


def _read(cfg: Config) -> tuple[PairGroups, str]:
    """Tokenise the training file as training does, and put the pairs into the order of its first epoch."""
    try:
        loader = open_run_inputs(cfg, sets=[TRAIN], weights=False).train_loader
    except ConfigError as error:
        fix = "give the lengths with --lengths PROMPT,CHOSEN,REJECTED"
        told = [Problem(one.where, one.value, one.expected, f"{one.fix}; or {fix}") for one in error.problems]
        raise ConfigError(told) from error
    dataset = loader.dataset
    pairs = loader.groups or PairGroups.alone(dataset.text_tokens())
    prompts = f" of {pairs.num_prompts} prompts" if loader.groups else ""
    return pairs.at(loader.order(0)), f"from {dataset.report.path}, {len(pairs)} pairs{prompts}"
