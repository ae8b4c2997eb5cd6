"""What a checkpoint's hf/ holds instead of the starting model's own files: the tokenizer, template and EOS of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.data.tokens.saved import end_ids, same_token_ids, saved_tokenizer
from megadpo.data.tokens.tokenizer import OWN_TEMPLATE, load_tokenizer, resolve_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = "tokenizer"
CONFIGS = ("config.json", "generation_config.json")


def other_than_own(cfg: Config, hf_files: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Which of tokenizer, chat template and EOS the config sets otherwise than the model folder `hf_files` has it; empty
    where they are the folder's own. tokenizer: the run's. Raises ConfigError for an unusable template."""
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
    except ConfigError:  # several of its own, and none is the default
        same_template = False
    same = {
        TOKENIZER: same_token_ids(tokenizer, own),
        "chat template": same_template,
        "EOS": tokenizer.eos_token_id == own.eos_token_id,
    }
    return [name for name, is_same in same.items() if not is_same]


def own_files(cfg: Config, hf_files: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """File name -> content of the files that take the place of those of the model folder: none where tokenizer, template
    and EOS are the folder's own, else the tokenizer's files and both configs. Raises ConfigError for an unusable
    template."""
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
    """Put the ids of the tokenizer's special tokens, and what ends an answer, into a model's config. keep: the ids
    there mean the same, so further ends beside the tokenizer's EOS stay."""
    for key in ("bos_token_id", "pad_token_id"):
        value = getattr(tokenizer, key)
        if value is not None or (key in raw and not keep):
            raw[key] = value
    present = raw.get("eos_token_id")
    further = present if keep and isinstance(present, list) and ends[-1] in present else []
    found = list(dict.fromkeys([*further, *ends]))
    raw["eos_token_id"] = found[0] if len(found) == 1 else found


def tokenizer_notes(cfg: Config, hf_files: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One line where tokenizer, template or EOS are not the model folder's own."""
    differences = other_than_own(cfg, hf_files, tokenizer)
    if not differences:
        return []
    others = ", ".join(differences)
    return [f"policy.tokenizer: not that of {hf_files} ({others}); the config's is used, and checkpoints hold it"]
