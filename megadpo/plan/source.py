"""config.json of the models that a config names, without their weights."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.families import read_architecture
from megadpo.model.source import resolve_source


def model_folder(name: str, field: str) -> Path:
    """The folder with `name`'s config.json, which may hold nothing else. Of a hub name only that file is fetched.

    Raises ConfigError naming `field` where there is none to be had.
    """
    if Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return resolve_source(name, field).hf_files
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except Exception as error:  # the hub client raises a dozen kinds; each means: not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
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
