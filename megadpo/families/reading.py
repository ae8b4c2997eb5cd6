"""Reads a Hugging Face folder's config.json into an Architecture, without transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.variants import FAMILIES
from megadpo.files.regular import read_at_most

MOST_BYTES = 16 * 2**20
"""Limit on the size of config.json."""
MOST_SIZE = 2**31 - 1
"""Limit on all sizes in it."""
MOST_LAYERS, MOST_EXPERTS = 1000, 1024
"""Limits, because each layer and expert has rows in the weight table. The largest models have 126 layers and 512 experts."""
RESTORE = "restore the model's own config.json"
_OUTSIDE = ("tie_word_embeddings", "quantization_config", "dtype", "torch_dtype")
OFF: tuple[object, ...] = (None, False, "", [], {})


def read_architecture(folder: str | Path, field: str = "policy.model_name") -> Architecture:
    """Read `folder`/config.json, in the form of transformers 4 or 5. field: the config key that names the folder.

    Raises ConfigError with every reason why the model can't be run: a missing folder or file, broken JSON, a class that no
    family has, or a setting that megadpo doesn't compute.
    """
    return parse_architecture(_read_json(Path(folder), field), str(Path(folder) / "config.json"))


def parse_architecture(raw: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """As read_architecture, from the parsed JSON; `where` names the file in problems."""
    hf_class = _class_name(raw)
    name = next((name for name in FAMILIES.names() if hf_class in FAMILIES[name].classes), None)
    if name is None:
        expected = "one of " + ", ".join(one for family in FAMILIES for one in family.classes)
        given = raw.get("model_type")
        fix = f"model_type {given!r} is not supported; choose a model that is, or name in plugins a file that adds it"
        raise ConfigError(Problem(f"{where}: architectures", hf_class or raw.get("model_type"), expected, fix))
    family = FAMILIES[name]()
    config = HfConfig(raw, name, hf_class, family.defaults, where)
    # transformers chooses the class by model_type
    config.refuse("model_type", f"{name}, of the class {hf_class}", RESTORE, unless=(None, name, *family.also_called))
    arch: Architecture = family.read(config)
    if config.problems:
        raise ConfigError(config.problems)
    return arch


def _class_name(raw: Mapping[str, Any]) -> str:
    """The model class; if config.json names none, the class of its model_type."""
    named = raw.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    model_type = str(raw.get("model_type"))
    return FAMILIES[model_type].classes[0] if model_type in FAMILIES else ""


def _read_json(folder: Path, field: str) -> dict[str, Any]:
    """`folder`/config.json. Raises ConfigError: with `field` if the folder or file is missing, else with the file."""
    path = folder / "config.json"
    hint = "give a Hugging Face model folder (config.json, *.safetensors, tokenizer files)"
    if not folder.is_dir():
        raise ConfigError(Problem(field, str(folder), "an existing folder", hint))
    if not path.is_file():
        raise ConfigError(Problem(field, str(folder), "a folder that holds config.json", hint))
    try:
        raw = json.loads(read_at_most(path, MOST_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(str(path), str(error), "readable JSON", RESTORE)) from error
    if not isinstance(raw, dict):
        raise ConfigError(Problem(str(path), type(raw).__name__, "a JSON object", RESTORE))
    return raw


def with_media_tokens(arch: Architecture, config: HfConfig) -> Architecture:
    """The text part `arch` of the vision-language model `config`, with the ids that stand for its images and videos."""
    keys = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    ids = tuple(dict.fromkeys(config.size(key, least=0) for key in keys if config.get(key) is not None))
    return dataclasses.replace(arch, media_tokens=ids)


class HfConfig:
    """config.json of one model, transformers' defaults for its class, and all problems so far.

    An absent key has its default; a null key is None.
    """

    def __init__(
        self, raw: Mapping[str, Any], family: str, hf_class: str, defaults: Mapping[str, Any], where: str
    ) -> None:
        """where: the file's name for problems."""
        self.raw = raw
        self.family = family
        self.hf_class = hf_class
        self.problems: list[Problem] = []
        self._defaults = defaults
        self._where = where

    def of_text(self) -> HfConfig:
        """The text part of a vision-language model's config.json, or the whole if it has none. Keys that both may have (the
        tied head, the dtype, quantisation) are read outside the text part."""
        given = self.raw.get("text_config")
        if given is None:
            return self
        if not isinstance(given, Mapping):
            self.report("text_config", given, "a JSON object")
            given = {}
        outside = {key: self.raw[key] for key in _OUTSIDE if key in self.raw}
        inside = {key: value for key, value in given.items() if key != "tie_word_embeddings"}
        text = HfConfig(
            {**inside, **outside}, self.family, self.hf_class, self._defaults, f"{self._where}: text_config"
        )
        text.problems = self.problems
        return text

    def get(self, key: str) -> Any:
        return self.raw.get(key, self._defaults.get(key))

    def report(self, key: str, value: object, expected: str, fix: str = RESTORE) -> None:
        """Add a problem."""
        self.problems.append(Problem(f"{self._where}: {key}", value, expected, fix))

    def size(self, key: str, *, least: int = 1, most: int = MOST_SIZE) -> int:
        """A whole number from `least` to `most`. For another value a problem is added, and the result is 1."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.report(key, value, f"a whole number from {least} to {most}")
            return 1
        return value

    def number(self, key: str, *, zero_too: bool = False) -> float:
        """A positive number, or 0 if `zero_too`. For another value a problem is added, and the result is 1."""
        value = self.get(key)
        sound = not isinstance(value, bool) and isinstance(value, (int, float))
        if not sound or value < 0 or (value == 0 and not zero_too):
            self.report(key, value, "a number >= 0" if zero_too else "a positive number")
            return 1.0
        return float(value)

    def refuse(self, key: str, expected: str, fix: str, *, unless: tuple[object, ...] = OFF) -> None:
        """Add a problem for a setting that transformers computes and megadpo does not, unless it has one of the values
        `unless`."""
        if key in self.raw and self.raw[key] not in unless:
            self.report(key, self.raw[key], expected, fix)
