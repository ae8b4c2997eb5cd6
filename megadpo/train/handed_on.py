"""Files of a checkpoint's hf/ that replace those of the starting model: the run's tokenizer, chat template and EOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.data.tokens.saved import end_ids, same_token_ids, saved_tokenizer
from megadpo.data.tokens.tokenizer import OWN_TEMPLATE, load_tokenizer, resolve_chat_template
from megadpo.model.manifest import AS_TRAINED, HF_TOKENIZER, INFO_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"
CONFIGS = ("config.json", "generation_config.json")


def other_than_own(cfg: Config, hf_files: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Which of tokenizer, chat template and EOS differ between the run and the model folder `hf_files`. tokenizer: the
    run's. Raises ConfigError for an unusable template."""
    settings = cfg.policy.tokenizer
    if settings.name == cfg.policy.model_name and settings.chat_template == OWN_TEMPLATE:
        return []
    template = resolve_chat_template(tokenizer, settings.chat_template)
    own = tokenizer
    if settings.name != cfg.policy.model_name:
        try:
            own = load_tokenizer(str(hf_files))
        except ConfigError:  # the folder has none
            return [TOKENIZER]
    try:
        same_template = resolve_chat_template(own, OWN_TEMPLATE) == template
    except ConfigError:  # it has several templates, but no default
        same_template = False
    same = {
        TOKENIZER: same_token_ids(tokenizer, own),
        "chat template": same_template,
        "EOS": tokenizer.eos_token_id == own.eos_token_id,
    }
    return [name for name, is_same in same.items() if not is_same]


def own_files(cfg: Config, hf_files: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name -> content of the files that replace those of the model folder: the tokenizer's files and both configs.
    Empty if tokenizer, template and EOS are those of the folder. Raises ConfigError for an unusable template."""
    differences = other_than_own(cfg, hf_files, tokenizer)
    if not differences:
        return {}
    template = resolve_chat_template(tokenizer, cfg.policy.tokenizer.chat_template)
    files = saved_tokenizer(tokenizer, template)
    ends = end_ids(tokenizer, template)
    for name in CONFIGS:
        path = hf_files / name
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        wanted = ends if name == "generation_config.json" else ends[-1:]
        _set_ids(raw, tokenizer, wanted, keep=TOKENIZER not in differences)
        files[name] = (json.dumps(raw, indent=2) + "\n").encode()
    return files


def _set_ids(raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, ends: list[int], *, keep: bool) -> None:
    """Writes the tokenizer's special ids, and the ids that end an answer, into a model's config. keep: the tokenizer is the
    same, so other EOS ids in the config stay."""
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, key)
        if value is not None or (key in raw and not keep):
            raw[key] = value
    present = raw.get("eos_token_id")
    further = present if keep and isinstance(present, list) and ends[-1] in present else []
    found = list(dict.fromkeys([*further, *ends]))
    raw["eos_token_id"] = found[0] if len(found) == 1 else found


def tokenizer_notes(cfg: Config, hf_files: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One line if tokenizer, template or EOS differ from the model folder's."""
    differences = other_than_own(cfg, hf_files, tokenizer)
    if not differences:
        return []
    others = ", ".join(differences)
    return [f"policy.tokenizer: differs from {hf_files} ({others}); the config's is used, and saved with checkpoints"]


def old_tokenizer_notes(checkpoint: Path) -> list[str]:
    """One line if a checkpoint's hf/ may have another tokenizer, template or EOS than the run was trained with. So it is for
    older checkpoints, without the entry HF_TOKENIZER, whose config sets others than those of the starting model."""
    try:
        if json.loads((checkpoint / INFO_FILE).read_bytes()).get(HF_TOKENIZER) == AS_TRAINED:
            return []
        policy = yaml.safe_load((checkpoint / "config.yaml").read_text(encoding="utf-8"))["policy"]
        settings = policy["tokenizer"]
        if (settings["name"], settings["chat_template"]) == (policy["model_name"], OWN_TEMPLATE):
            return []
        trained = (
            f"policy.tokenizer.name {settings['name']!r}, chat_template {_first_characters(settings['chat_template'])}"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # of no run, or damaged
        return []
    return [
        f"{checkpoint} doesn't say that its tokenizer is the one of training, as checkpoints of older versions don't: it was "
        f"trained with {trained}; where hf/ has another, set policy.tokenizer to it"
    ]


def _first_characters(value: object) -> str:
    """A value, short enough for a line."""
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
