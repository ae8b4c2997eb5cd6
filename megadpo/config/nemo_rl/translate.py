"""Translates NeMo RL's keys into megadpo's. Those in the table keys.yaml are refused, or noted as without effect."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megadpo.config.data_source import DataSource, parse_source
from megadpo.config.problems import Problem
from megadpo.config.tree import drop, get, put
from megadpo.config.variants import FORMATS

_MEG = "policy.megatron_cfg"
_HEAD_CHUNK = "policy.logprob_chunk_size"
_HEAD_CHUNK_NAMES = ("fused_linear_logprobs_chunk_size", "linear_ce_fusion_chunk_size")
_TARGETS = {"train": "train_data_path", "validation": "val_data_paths"}
# Keys of a dataset section that are refused at any value but null.
_MUST_BE_NULL = ("prompt_file", "system_prompt_file")
_SECTIONS = ("train", "validation", "default")


def _section_keys() -> tuple[str, ...]:
    """Keys of a dataset section."""
    return ("dataset_name", "data_path", "subset", "split", *FORMATS.keys(), *_MUST_BE_NULL)


@dataclass(frozen=True)
class NemoKey:
    """An entry of keys.yaml."""

    path: str
    """A path that ends in `.*` means the keys of a section that have no own entry."""
    why: str
    fix: str = ""
    accepted: tuple[object, ...] | None = None
    """The accepted values. None: all, or with `in_schema` those of the schema."""
    in_schema: bool = False
    """megadpo has the key."""
    experts: bool = False
    """Only models with experts refuse it."""
    refused: tuple[object, ...] = ()
    """With `experts` and `in_schema`: values that the schema lacks."""

    def problem(self, value: object) -> Problem | None:
        """The refusal of `value`; None if it is accepted."""
        if self.in_schema:
            listed = isinstance(value, str) and value in self.refused
            return Problem(self.path, value, f"another value ({self.why})", self.fix) if listed else None
        if self.accepted is None or any(type(value) is type(one) and value == one for one in self.accepted):
            return None
        shown = [str(one).lower() for one in self.accepted if one not in (None, {}, [])]
        shown += ["null"] if None in self.accepted else []
        return Problem(self.path, value, f"{' or '.join(shown)} ({self.why})", self.fix)


@functools.cache
def nemo_keys() -> dict[str, NemoKey]:
    """Path -> entry of keys.yaml."""
    text = Path(__file__).with_name("keys.yaml").read_text(encoding="utf-8")
    table = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C loader is ten times as fast
    keys: dict[str, NemoKey] = {}
    _collect({name: one for name, one in table.items() if not name.startswith("_")}, "", keys)
    return keys


def _collect(section: Mapping[str, Any], prefix: str, keys: dict[str, NemoKey]) -> None:
    for name, one in section.items():
        path = f"{prefix}{name}"
        if isinstance(one, str):
            keys[path] = NemoKey(path, one)
        elif "only" in one:
            keys[path] = NemoKey(path, one["why"], one["fix"], tuple(one["only"]), experts=one.get("experts", False))
        elif "why" in one:
            refused = tuple(one.get("refused", ()))
            keys[path] = NemoKey(
                path, one["why"], one.get("fix", ""), in_schema=True, experts="experts" in one, refused=refused
            )
        else:
            _collect(one, f"{path}.", keys)


def nemo_paths() -> frozenset[str]:
    """Every key that is translated or in the table, to suggest one for an unknown key."""
    return frozenset(path for path in nemo_keys() if not path.endswith(".*")) | {
        f"data.{section}.{key}" for section in _SECTIONS for key in _section_keys()
    }


@functools.cache
def _sections() -> frozenset[str]:
    """Every section with a key of the table."""
    return frozenset(path[:dot] for path in nemo_keys() for dot, letter in enumerate(path) if letter == ".")


@dataclass
class NemoFindings:
    """Refusals and notes about the keys of a file."""

    problems: list[Problem]
    with_experts: list[Problem] = field(default_factory=list)
    """Refusals for a model with experts only."""
    notes: list[str] = field(default_factory=list)
    no_effect: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys without effect that ask for something."""

    def all_notes(self) -> list[str]:
        """The notes. One of them names all keys without effect."""
        if not self.no_effect:
            return self.notes
        folded = "; ".join(f"{', '.join(paths)} ({why})" for why, paths in self.no_effect.items())
        return [*self.notes, f"NeMo RL's keys without effect here: {folded}"]


def translate(tree: dict[str, Any], schema_paths: frozenset[str], found: NemoFindings) -> set[str]:
    """Rewrites `tree` in place: NeMo RL's keys become megadpo's or go; unknown keys stay.

    Refusals and notes are added to `found`. Returns the keys that a refused section would have set: they must not be
    reported as missing.
    """
    _balancing_coefficient(tree, found)
    _async_save(tree, found)
    _strip(tree, "", schema_paths, found)
    _head_chunk(tree, found.problems)
    _other_values(tree, found.notes)
    data = tree.get("data")
    return _translate_data(data, found.problems, found.notes) if isinstance(data, dict) else set()


def _strip(node: dict[str, Any], prefix: str, schema_paths: frozenset[str], found: NemoFindings) -> None:
    """Removes the table's keys from a section, each with its refusal or note."""
    for name, value in list(node.items()):
        path = f"{prefix}{name}"
        key = nemo_keys().get(path)
        if key is not None:
            refusal = key.problem(value)
            if refusal is not None:
                (found.with_experts if key.experts else found.problems).append(refusal)
            elif key.accepted is None and not key.in_schema and _says_something(value):
                found.no_effect.setdefault(key.why, []).append(path)
            if refusal is not None or value is None or not key.in_schema:
                del node[name]
        elif isinstance(value, dict):
            others = nemo_keys().get(f"{path}.*")
            own = nemo_keys().keys() | _sections()
            without_effect = [str(one) for one in value if f"{path}.{one}" not in own and _says_something(value[one])]
            _strip(value, f"{path}.", schema_paths, found)
            if others is not None and without_effect:
                found.no_effect.setdefault(others.why, []).append(f"{path}.{{{', '.join(without_effect)}}}")
            if others is not None or (not value and path in _sections() and path not in schema_paths):
                del node[name]
        elif path in _sections() and path not in schema_paths:
            if value is not None:
                found.problems.append(Problem(path, value, "a section or null", "set it to null"))
            del node[name]


def _says_something(value: object) -> bool:
    """Whether a value asks for anything."""
    return value not in (None, False, "", "none", "disabled", {}, [])


def _balancing_coefficient(tree: dict[str, Any], found: NemoFindings) -> None:
    """router_aux_loss_coef is the only override of config.json that has a key here."""
    overrides, path = get(tree, "policy.hf_config_overrides"), f"{_MEG}.moe_aux_loss_coeff"
    if not isinstance(overrides, dict) or "router_aux_loss_coef" not in overrides:
        return
    coefficient = overrides.pop("router_aux_loss_coef")
    if get(tree, path) is None:
        put(tree, path, coefficient)
        found.notes.append(f"policy.hf_config_overrides.router_aux_loss_coef: read as {path}: {coefficient}")


def _async_save(tree: dict[str, Any], found: NemoFindings) -> None:
    """NeMo RL has this key in a section for Megatron and in one for its other backend."""
    ours = "checkpointing.async_save"
    for path in (f"{_MEG}.checkpoint.async_save", "checkpointing.is_async"):
        value = get(tree, path)
        drop(tree, path)
        if value is not None and get(tree, ours) is None:
            put(tree, ours, value)
            if _says_something(value):
                found.notes.append(f"{path}: read as {ours}: {value}")


def _other_values(tree: dict[str, Any], notes: list[str]) -> None:
    """Values that megadpo writes in another way, and values that are replaced by one with the same result."""
    for path in ("dpo.val_batches", "dpo.val_period"):  # -1 means the whole set, or never
        if get(tree, path) == -1:
            put(tree, path, 0)
    if get(tree, "policy.max_grad_norm", 0) is None:
        put(tree, "policy.max_grad_norm", 0.0)
    if get(tree, "policy.make_sequence_length_divisible_by") == 1:  # no limit; NeMo RL sets its other backend's tp here
        drop(tree, "policy.make_sequence_length_divisible_by")
    dispatcher = f"{_MEG}.moe_token_dispatcher_type"
    if get(tree, dispatcher) == "flex":
        put(tree, dispatcher, "alltoall")
        notes.append(f"{dispatcher}: alltoall for flex, whose DeepEP and HybridEP are not among the dependencies")
    if get(tree, f"{_MEG}.fp8_cfg.enabled") is False:
        drop(tree, f"{_MEG}.fp8_cfg.fp8_recipe")
    if get(tree, f"{_MEG}.peft.lora_dtype") == "None":  # so in all of NeMo RL's files
        drop(tree, f"{_MEG}.peft.lora_dtype")
    _precision_aware(tree, notes)


def _precision_aware(tree: dict[str, Any], notes: list[str]) -> None:
    """With float32 moments the precision-aware optimizer computes the same numbers in less memory. It is switched off if
    checkpoints save the optimizer, because a resume from its state is not proved. NeMo RL's files ask for both."""
    optimizer = get(tree, f"{_MEG}.optimizer", {})
    saves = get(tree, "checkpointing.enabled", True) and get(tree, "checkpointing.save_optimizer", True)
    if not saves or not isinstance(optimizer, dict) or optimizer.get("use_precision_aware_optimizer") is not True:
        return
    moments = {optimizer.get(name) for name in ("exp_avg_dtype", "exp_avg_sq_dtype")}
    if not optimizer.get("optimizer_cpu_offload") and moments <= {None, "float32"}:
        optimizer["use_precision_aware_optimizer"] = False
        notes.append(
            f"{_MEG}.optimizer.use_precision_aware_optimizer: off while checkpoints save the optimizer, whose state is "
            "not proved to resume with it; same numbers, more memory; checkpointing.save_optimizer: false keeps it on"
        )


def _head_chunk(tree: dict[str, Any], problems: list[Problem]) -> None:
    """NeMo RL has two more names for policy.logprob_chunk_size."""
    for name in _HEAD_CHUNK_NAMES:
        path = f"{_MEG}.{name}"
        value, chosen = get(tree, path), get(tree, _HEAD_CHUNK)
        drop(tree, path)
        if value is not None and chosen is None:
            put(tree, _HEAD_CHUNK, value)
        elif value is not None and value != chosen:
            problems.append(Problem(path, value, f"{chosen}, as {_HEAD_CHUNK}", f"keep {_HEAD_CHUNK} only"))


def _translate_data(data: dict[str, Any], problems: list[Problem], notes: list[str]) -> set[str]:
    """Rewrites the section `data` in place with megadpo's keys; unknown keys stay for the reader to report.

    NeMo RL's newer form has `train:`, `validation:` and `default:` sections. In both forms the names HelpSteer3 and
    Tulu3Preference without a path mean a hub data set. Returns the keys that a refused section would have set: they must
    not be reported as missing.
    """
    unset: set[str] = set()
    default = _section(data, "default", problems)
    given = [name for name in _TARGETS if data.get(name) is not None]
    sections = {name: _dataset_sections(data, name, problems) for name in _TARGETS}
    unset |= {f"data.{_TARGETS[name]}" for name in given if not sections[name]}
    seen: dict[str, tuple[object, str]] = {
        key: (data[key], f"data.{key}") for key in ("dataset_name", *FORMATS.keys()) if data.get(key) is not None
    }
    for name, several in sections.items():
        paths, target = [], _TARGETS[name]
        for where, own in several.items():
            merged = {**(default or {}), **own}
            paths.append(_source(merged, where, problems, notes))
            _take_common_keys(data, merged, where, seen, problems)
        found = [path for path in paths if path is not None]
        if len(found) < len(paths):
            unset.add(f"data.{target}")
        elif found and data.get(target) is not None:
            expected = f"nothing, since data.{target} is set"
            where = f"{next(iter(several))}.data_path"
            problems.append(Problem(where, found[0], expected, f"keep one of the two: data.{target}"))
        elif found:
            data[target] = found[0] if len(found) == 1 else found
    _single_validation_path(data, problems)
    if not any(sections.values()):
        _hub_dataset_alone(data)
    return unset


def _dataset_sections(data: dict[str, Any], name: str, problems: list[Problem]) -> dict[str, dict[str, Any]]:
    """Key -> dataset section, of one section or of a list of them. (Their pairs are joined, as in NeMo RL.)"""
    raw = data.get(name)
    if isinstance(raw, list) and raw and all(isinstance(one, dict) for one in raw):
        return {f"data.{name}[{number}]": one for number, one in enumerate(data.pop(name))}
    own = _section(data, name, problems)
    return {} if own is None else {f"data.{name}": own}


def _section(data: dict[str, Any], name: str, problems: list[Problem]) -> dict[str, Any] | None:
    if name not in data:
        return None
    raw = data.pop(name)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        fix = "write it as {data_path: ...}, or give the sources as data.train_data_path and data.val_data_paths"
        problems.append(Problem(f"data.{name}", raw, "a dataset section, or a list of them", fix))
        return None
    return raw


def _take_common_keys(
    data: dict[str, Any],
    section: dict[str, Any],
    where: str,
    seen: dict[str, tuple[object, str]],
    problems: list[Problem],
) -> None:
    """Moves the format and the field names of a section to `data`, where they are valid for every source."""
    for key in ("dataset_name", *FORMATS.keys()):
        mine = section.get(key)
        if mine is None or (key == "dataset_name" and mine not in FORMATS):
            continue
        value, seen_at = seen.setdefault(key, (mine, f"{where}.{key}"))
        if value != mine:
            fix = "use the same key in every file"
            if key == "dataset_name":
                fix = "give both a data_path and no dataset_name: each source's format is recognised from its rows"
            problems.append(Problem(f"{where}.{key}", mine, f"{value!r}, as {seen_at}", fix))
        data[key] = value


def _source(section: dict[str, Any], where: str, problems: list[Problem], notes: list[str]) -> str | None:
    """The source that a dataset section names, in train_data_path's syntax; None with a problem."""
    name = section.get("dataset_name")
    if name is not None and name not in FORMATS:
        fix = "use one of these formats: give the file, folder or hub name as data_path and its format as dataset_name"
        problems.append(Problem(f"{where}.dataset_name", name, f"one of {', '.join(FORMATS.names())}", fix))
        return None
    for key in section:
        if key in _MUST_BE_NULL and section[key] is not None:
            fix = "remove it: prompts are taken as they are, so write what they say into the data"
            problems.append(Problem(f"{where}.{key}", section[key], "null", fix))
        elif key not in _section_keys():
            fix = f"known here: {', '.join(_section_keys())}"
            problems.append(Problem(f"{where}.{key}", section[key], "a known key; this one is not", fix))
    path = section.get("data_path")
    hub = _hub_dataset(name)
    subset, split = section.get("subset"), section.get("split")
    if path is None and hub is not None:
        path, subset = hub.path, subset or hub.subset
    if not isinstance(path, str):
        known = " or ".join(name for name in FORMATS.names() if FORMATS[name].hub)
        expected = f"a file, folder or hub name; only dataset_name {known} needs none"
        problems.append(Problem(f"{where}.data_path", path, expected, f"set {where}.data_path"))
        return None
    for key, value in (("subset", subset), ("split", split)):
        if value is not None and not isinstance(value, str):
            problems.append(Problem(f"{where}.{key}", value, "text or null", "put it in quotes"))
            return None
    if not parse_source(path).is_file:
        return str(DataSource(path, subset, split))
    for key, value, idle in (("subset", subset, (None,)), ("split", split, (None, "train"))):
        if value not in idle:
            shown = " or ".join("null" if one is None else one for one in idle)
            problems.append(Problem(f"{where}.{key}", value, shown, "remove it: a file is read whole"))
        elif value is not None:
            notes.append(f"{where}.{key}: {value!r} has no effect: a local file has no splits")
    return path


def _hub_dataset(name: object) -> Any:
    """The hub data set that a format is named after, or None."""
    return FORMATS[name].hub if isinstance(name, str) and name in FORMATS else None


def _hub_dataset_alone(data: dict[str, Any]) -> None:
    """`dataset_name: HelpSteer3` without a path means the hub data set, and its validation split unless another is given."""
    hub = _hub_dataset(data.get("dataset_name"))
    if hub is None or data.get("train_data_path") is not None:
        return
    data["train_data_path"] = str(DataSource(hub.path, hub.subset, "train"))
    if hub.validation_split is not None and "val_data_paths" not in data:
        data["val_data_paths"] = {"default": str(DataSource(hub.path, hub.subset, hub.validation_split))}


def _single_validation_path(data: dict[str, Any], problems: list[Problem]) -> None:
    """`val_data_path: p` and `val_data_paths: p` mean `val_data_paths: {default: p}`, as in NeMo RL."""
    single = data.pop("val_data_path", None)
    if single is not None:
        if data.get("val_data_paths") is not None:
            fix = "keep data.val_data_paths only"
            problems.append(Problem("data.val_data_path", single, "nothing, since data.val_data_paths is set", fix))
        else:
            data["val_data_paths"] = single
    if isinstance(data.get("val_data_paths"), (str, list)):
        data["val_data_paths"] = {"default": data["val_data_paths"]}
