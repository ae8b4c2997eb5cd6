"""The config's way in and out: load_config, build_config, as_dict, save_resolved."""

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
from megadpo.config.nemo_rl.translate import Heard, nemo_keys, nemo_paths, translate
from megadpo.config.no_effect import idle_notes
from megadpo.config.precedence import give_way
from megadpo.config.problems import ConfigError, Problem, covered
from megadpo.config.reader import Reader, dotted_paths, keys_of
from megadpo.config.schema import Config
from megadpo.config.tree import read_tree
from megadpo.config.trl import translate_losses
from megadpo.config.variants import import_plugins, option_fields
from megadpo.files.atomic import write_then_rename

Purpose = Literal["train", "evaluate"]
"""What the config is for: train needs data.train_data_path, evaluate needs data.val_data_paths."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, purpose: Purpose = "train") -> Config:
    """Read a YAML file with `defaults:`, `${...}` and `a.b=c` overrides into a checked Config.

    Order: defaults, file, overrides, interpolation, what the overrides outdo in other keys, NeMo RL's spellings, derived
    values, types, rules.
    Raises ConfigError with every problem found.
    """
    problems: list[Problem] = []
    tree, environment = read_tree(path, overrides, problems)
    notes = give_way(tree, overrides)
    return _build(tree, problems, notes, purpose, environment)


def build_config(tree: Mapping[str, Any], *, purpose: Purpose = "train") -> Config:
    """A checked Config from a plain mapping without interpolations. Raises ConfigError with every problem found."""
    return _build(copy.deepcopy(dict(tree)), [], [], purpose)


def as_dict(cfg: Config) -> dict[str, Any]:
    """The resolved config as plain dicts, lists and scalars: what YAML and loggers take. No file may set the rest."""
    keys = keys_of(type(cfg))
    return {name: value for name, value in _plain(cfg).items() if name in keys}


def as_written(cfg: Config) -> dict[str, Any]:
    """`as_dict` as files and loggers get it: `${oc.env:NAME}` for values from the environment, and `\\${` for `${` in a
    text."""
    written: dict[str, Any] = hidden(as_dict(cfg), cfg.environment)
    return written


def resolved_text(cfg: Config) -> str:
    """The resolved config as YAML that load_config, in the same environment, reads back as an equal Config."""
    text: str = yaml.safe_dump(as_written(cfg), sort_keys=False, allow_unicode=True)
    return text


def save_resolved(cfg: Config, path: str | Path, chosen: Mapping[str, str] | None = None) -> None:
    """Write the resolved config as YAML, complete or not at all; load_config reads it back as an equal Config.

    chosen: what `auto` came to on this machine, by name; written as comments.
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
    if isinstance(plugins, list):  # first: they add keys to the schema
        import_plugins([name for name in plugins if isinstance(name, str)])
    paths = frozenset(dotted_paths(Config))
    heard = Heard(problems, notes=notes)
    unreadable |= translate(tree, paths, heard) | translate_losses(tree, problems, heard.notes)
    derived = derive(tree)
    reader = Reader(paths | nemo_paths())
    cfg = reader.section(Config, tree, "")
    if "policy.model_name" in unreadable | reader.bad:
        # The tokenizer's name follows the model's: it is not missing on its own.
        unreadable |= {"policy.tokenizer", "policy.tokenizer.name"}
    # One mistake, one problem: what failed before (its ${...}, say) is not called missing as well, and a value that
    # follows from a wrong one is not called wrong as well.
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
    notes = [*heard.all_notes(), *idle_notes(cfg)]
    return dataclasses.replace(
        cfg, notes=tuple(notes), environment=environment or {}, refused_with_experts=tuple(heard.of_experts)
    )


def _with_reason(problem: Problem) -> Problem:
    """With why a value of NeMo RL's is not among those of the schema."""
    key = nemo_keys().get(problem.where)
    return problem if key is None else dataclasses.replace(problem, expected=f"{problem.expected} ({key.why})")


def _missing_data(cfg: Config, purpose: Purpose) -> list[Problem]:
    if purpose == "train" and not any(path.strip() for path in cfg.data.train_paths):
        fix = "set data.train_data_path in the file or on the command line"
        return [
            Problem("data.train_data_path", None, "a file, folder or hub name of training pairs; it is required", fix)
        ]
    if purpose == "evaluate" and not cfg.data.val_data_paths:
        fix = "set data.val_data_paths: {name: pairs.jsonl}"
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
