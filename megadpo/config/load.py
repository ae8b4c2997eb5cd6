"""Reads a config, and writes the resolved one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from megadpo.config import check, check_moe, rules_optimizer, rules_peft, rules_run  # noqa: F401  their rules register
from megadpo.config.derive import derive
from megadpo.config.interpolation import Environment, hidden
from megadpo.config.known import Known, find_problems
from megadpo.config.nemo_rl.translate import NemoFindings, nemo_keys, nemo_paths, translate
from megadpo.config.no_effect import no_effect_notes
from megadpo.config.precedence import drop_contradicted
from megadpo.config.problems import ConfigError, Problem, covered
from megadpo.config.reader import Reader, dotted_paths, keys_of
from megadpo.config.schema import Config
from megadpo.config.tree import read_tree
from megadpo.config.trl import translate_losses
from megadpo.config.variants import import_plugins, option_fields
from megadpo.files.atomic import write_then_rename

Purpose = Literal["train", "evaluate"]
"""train needs data.train_data_path, evaluate a validation set."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, purpose: Purpose = "train") -> Config:
    """Read a YAML file with `defaults:`, `${...}` and `a.b=c` overrides into a checked Config.

    Order: defaults, file, overrides, interpolation, values of the file that contradict an override (precedence.py), NeMo
    RL's keys, derived values, types, rules. Raises ConfigError with every problem found.
    """
    problems: list[Problem] = []
    tree, environment = read_tree(path, overrides, problems)
    notes = drop_contradicted(tree, overrides)
    return _build(tree, problems, notes, purpose, environment)


def build_config(tree: Mapping[str, Any], *, purpose: Purpose = "train") -> Config:
    """A checked Config from a plain mapping without interpolations. Raises ConfigError with every problem found."""
    return _build(copy.deepcopy(dict(tree)), [], [], purpose)


def as_dict(cfg: Config) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and scalars, without fields that are no keys."""
    keys = keys_of(type(cfg))
    return {name: value for name, value in _plain(cfg).items() if name in keys}


def as_written(cfg: Config) -> dict[str, Any]:
    """`as_dict` for files and loggers: with `${oc.env:NAME}` for values from the environment, and `\\${` for `${` in
    texts."""
    written: dict[str, Any] = hidden(as_dict(cfg), cfg.environment)
    return written


def resolved_text(cfg: Config) -> str:
    """The resolved config as YAML that load_config, in the same environment, reads back as an equal Config."""
    text: str = yaml.safe_dump(as_written(cfg), sort_keys=False, allow_unicode=True)
    return text


def save_resolved(cfg: Config, path: str | Path, chosen: Mapping[str, str] | None = None) -> None:
    """Writes the resolved config as YAML, complete or not at all. load_config reads it back as an equal Config.

    chosen: name -> what `auto` has chosen on this machine; written as comments.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    comments = "".join(f"# chosen on this machine: {name}: {words}\n" for name, words in (chosen or {}).items())
    with write_then_rename(target) as partial:
        partial.write_text(comments + resolved_text(cfg), encoding="utf-8")


def _build(
    tree: dict[str, Any],
    problems: list[Problem],
    notes: list[str],
    purpose: Purpose,
    environment: Environment | None = None,
) -> Config:
    unreadable = {problem.where for problem in problems}
    plugins = tree.get("plugins")
    if isinstance(plugins, list):  # first, because they add keys to the schema
        import_plugins([name for name in plugins if isinstance(name, str)])
    paths = frozenset(dotted_paths(Config))
    found = NemoFindings(problems, notes=notes)
    unreadable |= translate(tree, paths, found) | translate_losses(tree, problems, found.notes)
    derived = derive(tree)
    reader = Reader(paths | nemo_paths())
    cfg = reader.section(Config, tree, "")
    if "policy.model_name" in unreadable | reader.bad:
        # The tokenizer's name is derived from the model's: don't report it too.
        unreadable |= {"policy.tokenizer", "policy.tokenizer.name"}
    # One mistake gives one problem: a value whose ${...} failed is not also reported as missing, and a value that is
    # derived from a wrong one is not also reported as wrong.
    problems += [
        _with_reason(one)
        for one in reader.problems
        if one.where not in derived and (one.where not in unreadable or one.value is not None)
    ]
    bad = frozenset(reader.bad) | unreadable | {problem.where for problem in problems}
    problems += find_problems(Known(cfg=cfg), bad)
    problems += [one for one in _missing_data(cfg, purpose) if not covered(one.where, bad)]
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(
        cfg,
        notes=(*found.all_notes(), *no_effect_notes(cfg)),
        environment=environment or {},
        refused_with_experts=tuple(found.with_experts),
    )


def _with_reason(problem: Problem) -> Problem:
    """Adds the reason why the schema lacks a value that NeMo RL has."""
    key = nemo_keys().get(problem.where)
    return problem if key is None else dataclasses.replace(problem, expected=f"{problem.expected} ({key.why})")


def _missing_data(cfg: Config, purpose: Purpose) -> list[Problem]:
    reads_train = purpose == "train" or cfg.data.holdout is not None
    if reads_train and not any(path.strip() for path in cfg.data.train_paths):
        fix = "set data.train_data_path in the file or on the command line"
        return [
            Problem("data.train_data_path", None, "a file, folder or hub name of training pairs; it is required", fix)
        ]
    if purpose == "evaluate" and not cfg.data.val_names:
        fix = "set data.val_data_paths: {name: pairs.jsonl}, or data.holdout"
        return [Problem("data.val_data_paths", None, "one or more named sets to evaluate on", fix)]
    return []


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = option_fields(type(value))
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            of_field = _plain(getattr(value, field.name))
            plain |= of_field if field.name in held else {field.name: of_field}
        return plain
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value
