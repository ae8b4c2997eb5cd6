"""The lengths of a run's pairs: from its data where that can be read, else as stated, else the longest there can be."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.architecture import Architecture
from megadpo.config.data_source import parse_source
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.plan.packs import Lengths, stated_lengths
from megadpo.plan.source import model_folder


def choose_lengths(cfg: Config, arch: Architecture, stated: str | None) -> tuple[Lengths, str]:
    """int64 [N, 3] tokens of prompt, chosen and rejected, and where they are from.

    `stated` ("512,256,256") wins over the data. Raises UserError for text that states no lengths, and for data that is
    there but can't be read.
    """
    if stated is not None:
        return stated_lengths(cfg, _parse(stated))
    if not Path(parse_source(cfg.data.train_data_path).path).exists():  # a hub name would be downloaded
        return stated_lengths(cfg, None)
    return _read(cfg, arch)


def _parse(stated: str) -> tuple[int, int, int]:
    parts = stated.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        fix = "for example --lengths 512,256,256"
        raise ConfigError(Problem("--lengths", stated, "three whole numbers above 0: prompt,chosen,rejected", fix))
    prompt, chosen, rejected = (int(part) for part in parts)
    return prompt, chosen, rejected


def _read(cfg: Config, arch: Architecture) -> tuple[Lengths, str]:
    """Tokenise the training file as training does, and put the pairs into the order of its first epoch."""
    from megadpo.data.batches.loader import GlobalBatchLoader
    from megadpo.data.tokens.dataset import load_datasets
    from megadpo.data.tokens.tokenizer import load_tokenizer

    name = cfg.policy.tokenizer.name
    if name == cfg.policy.model_name:
        name = str(model_folder(name, "policy.model_name"))
    try:
        tokenizer = load_tokenizer(name)
    except ConfigError as error:
        fix = "state the lengths with --lengths PROMPT,CHOSEN,REJECTED, or name a tokenizer"
        told = [Problem(one.where, one.value, one.expected, f"{one.fix}; or {fix}") for one in error.problems]
        raise ConfigError(told) from error
    pairs = load_datasets(cfg, {"train": cfg.data.train_data_path}, tokenizer, arch.vocab_size)["train"]
    loader = GlobalBatchLoader.from_config(pairs, cfg, arch, pad_token_id=0, training=True)
    return pairs.text_tokens()[loader.order(0)], f"from {pairs.report.path}, {len(pairs)} pairs"
