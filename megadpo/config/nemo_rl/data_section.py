"""NeMo RL's forms of `data:` in terms of this project's keys.

The newer form has `train:`, `validation:` and `default:` sections; in both forms the names HelpSteer3 and
Tulu3Preference alone mean a dataset of the hub.
"""

from __future__ import annotations

from typing import Any

from megadpo.config.data_source import DataSource, parse_source
from megadpo.config.problems import Problem
from megadpo.config.variants import FORMATS

_TARGETS = {"train": "train_data_path", "validation": "val_data_paths"}
_KEYS = ("prompt_key", "chosen_key", "rejected_key")
# Keys of a dataset section that are refused at any other value.
_IDLE = ("prompt_file", "system_prompt_file")
_SECTION_KEYS = ("dataset_name", "data_path", "subset", "split", *_KEYS, *_IDLE)
SECTION_PATHS = frozenset(
    f"data.{section}.{key}" for section in ("train", "validation", "default") for key in _SECTION_KEYS
)


def translate_data(data: dict[str, Any], problems: list[Problem], notes: list[str]) -> set[str]:
    """Rewrite `data` in place so that it holds only this project's keys, plus what nobody knows.

    Returns the keys that a refused section would have set: what they hold now must not be judged.
    """
    unset: set[str] = set()
    default = _section(data, "default", problems)
    for name, target in _TARGETS.items():
        if data.get(name) is not None and not isinstance(data[name], dict):
            unset.add(f"data.{target}")
    sections = {name: _section(data, name, problems) for name in _TARGETS}
    seen: dict[str, tuple[object, str]] = {
        key: (data[key], f"data.{key}") for key in ("dataset_name", *_KEYS) if data.get(key) is not None
    }
    for name, own in sections.items():
        if own is None:
            continue
        where = f"data.{name}"
        merged = {**(default or {}), **own}
        path = _source(merged, where, problems, notes)
        _take_common_keys(data, merged, where, seen, problems)
        target = _TARGETS[name]
        if path is None:
            unset.add(f"data.{target}")
        elif data.get(target) is not None:
            expected = f"nothing, since data.{target} is set"
            problems.append(Problem(f"{where}.data_path", path, expected, f"keep one of the two: data.{target}"))
        else:
            data[target] = path
    _single_validation_path(data, problems)
    if not any(sections.values()):
        _hub_dataset_alone(data)
    return unset


def _section(data: dict[str, Any], name: str, problems: list[Problem]) -> dict[str, Any] | None:
    if name not in data:
        return None
    raw = data.pop(name)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        fix = "give one source: data.train_data_path; several sets only for validation, in data.val_data_paths"
        problems.append(Problem(f"data.{name}", raw, "one dataset section", fix))
        return None
    return raw


def _take_common_keys(
    data: dict[str, Any],
    section: dict[str, Any],
    where: str,
    seen: dict[str, tuple[object, str]],
    problems: list[Problem],
) -> None:
    """Moves the format and the field names of a section up to `data`, where they hold for every source."""
    for key in ("dataset_name", *_KEYS):
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
    """The source that a dataset section names, as train_data_path writes it; None with a problem."""
    name = section.get("dataset_name")
    if name is not None and name not in FORMATS:
        fix = "use one of these formats: give the file, folder or hub name as data_path and its format as dataset_name"
        problems.append(Problem(f"{where}.dataset_name", name, f"one of {', '.join(FORMATS.names())}", fix))
        return None
    for key in section:
        if key in _IDLE and section[key] is not None:
            fix = "remove it: prompts are taken as they are, so write what they say into the data"
            problems.append(Problem(f"{where}.{key}", section[key], "null", fix))
        elif key not in _SECTION_KEYS:
            fix = f"known here: {', '.join(_SECTION_KEYS)}"
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
    """The data set of the hub that a format is known for, or None."""
    return FORMATS[name].hub if isinstance(name, str) and name in FORMATS else None


def _hub_dataset_alone(data: dict[str, Any]) -> None:
    """`dataset_name: HelpSteer3` and no path: the hub's dataset, and its validation split where nothing else is said."""
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
    if isinstance(data.get("val_data_paths"), str):
        data["val_data_paths"] = {"default": data["val_data_paths"]}
