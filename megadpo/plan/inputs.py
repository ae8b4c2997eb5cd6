"""Reads the inputs of a plan: config.json of the config's models, without weights, and the lengths of its pairs."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.architecture import Architecture
from megadpo.config.data_source import parse_source
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.plan.packs import Lengths, stated_lengths
from megadpo.train.inputs import TRAIN, open_models, open_run_inputs


def architectures(cfg: Config) -> tuple[Architecture, Architecture | None]:
    """The policy's, and the resident reference's (or None). Raises ConfigError with every problem of both."""
    models = open_models(cfg, weights=False)
    return models.arch, models.reference_arch if cfg.dpo.reference.mode == "resident" else None


def choose_lengths(cfg: Config, stated: str | None) -> tuple[Lengths, str]:
    """int64 [N, 3] tokens of prompt, chosen and rejected, and a text about their origin.

    `stated` ("512,256,256") replaces the data. Without `stated` and data, every pair is as long as the config allows. Raises
    UserError if `stated` is invalid, or if the data exists but can't be read.
    """
    if stated is not None:
        return stated_lengths(cfg, _parse(stated))
    if not Path(parse_source(cfg.data.train_data_path).path).exists():  # hub data sets are not downloaded
        return stated_lengths(cfg, None)
    return _read(cfg)


def _parse(stated: str) -> tuple[int, int, int]:
    parts = stated.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        fix = "for example --lengths 512,256,256"
        raise ConfigError(Problem("--lengths", stated, "three whole numbers above 0: prompt,chosen,rejected", fix))
    prompt, chosen, rejected = (int(part) for part in parts)
    return prompt, chosen, rejected


def _read(cfg: Config) -> tuple[Lengths, str]:
    """Tokenises the training file as training does. The pairs are in the order of the first epoch."""
    try:
        loader = open_run_inputs(cfg, sets=[TRAIN], weights=False).train_loader
    except ConfigError as error:
        fix = "give the lengths with --lengths PROMPT,CHOSEN,REJECTED"
        told = [Problem(one.where, one.value, one.expected, f"{one.fix}; or {fix}") for one in error.problems]
        raise ConfigError(told) from error
    pairs = loader.dataset
    return pairs.text_tokens()[loader.order(0)], f"from {pairs.report.path}, {len(pairs)} pairs"
