"""What a plan reads: config.json of the models that a config names, without weights, and the lengths of its pairs."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.architecture import Architecture
from megadpo.config.data_source import parse_source
from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.config.schema import Config
from megadpo.families import read_architecture
from megadpo.model.source import resolve_source
from megadpo.plan.packs import Lengths, stated_lengths


def model_folder(name: str, field: str) -> Path:
    """The folder with `name`'s config.json, which may hold nothing else. Of a hub name only that file is fetched.

    Raises ConfigError naming `field` where neither exists.
    """
    if Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return resolve_source(name, field).hf_files
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub client raises a dozen kinds, and each means that the file can't be fetched
        reason = first_line(error)
        expected = f"a folder with config.json, or a hub name whose config.json can be fetched; the hub says: {reason}"
        fix = f"put the model's config.json into a folder and set {field} to it; weights are not needed for a plan"
        raise ConfigError(Problem(field, name, expected, fix)) from error


def architectures(cfg: Config) -> tuple[Architecture, Architecture | None]:
    """The policy's, and the reference's where there is one. Raises ConfigError with every problem of both."""
    named = {"policy.model_name": cfg.policy.model_name}
    if cfg.dpo.reference.mode == "resident" and cfg.dpo.reference.model_name is not None:
        named["dpo.reference.model_name"] = cfg.dpo.reference.model_name
    found: list[Architecture] = []
    problems: list[Problem] = []
    for field, name in named.items():
        try:
            found.append(read_architecture(model_folder(name, field), field))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found[0], found[-1] if cfg.dpo.reference.mode == "resident" else None


def choose_lengths(cfg: Config, arch: Architecture, stated: str | None) -> tuple[Lengths, str]:
    """int64 [N, 3] tokens of prompt, chosen and rejected, and where they are from.

    `stated` ("512,256,256") goes before the data; without either, every pair is as long as the config allows. Raises
    UserError for text that states no lengths, and for data that exists but can't be read.
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
