"""NeMo RL's newer `data:` form (`train:`, `validation:`, `default:` sections) in terms of this project's keys."""

from __future__ import annotations

from typing import Any

from megadpo.config.problems import Problem

FORMAT = "BinaryPreferenceDataset"
_TARGETS = {"train": "train_data_path", "validation": "val_data_paths"}
_KEYS = ("prompt_key", "chosen_key", "rejected_key")
# Keys of a dataset section, and the values that mean nothing for a local JSONL file.
_IDLE: dict[str, tuple[object, ...]] = {
    "split": (None, "train"),
    "subset": (None,),
    "prompt_file": (None,),
    "system_prompt_file": (None,),
}
SECTION_PATHS = frozenset(
    f"data.{section}.{key}"
    for section in ("train", "validation", "default")
    for key in ("dataset_name", "data_path", *_KEYS, *_IDLE)
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
    keys_seen: dict[str, tuple[object, str]] = {key: (data[key], f"data.{key}") for key in _KEYS if key in data}
    for name, own in sections.items():
        if own is None:
            continue
        where = f"data.{name}"
        merged = {**(default or {}), **own}
        path = _dataset_path(merged, where, problems, notes)
        for key in _KEYS:
            if key in merged:
                value, seen_at = keys_seen.setdefault(key, (merged[key], f"{where}.{key}"))
                if value != merged[key]:
                    fix = "use the same key in every file"
                    problems.append(Problem(f"{where}.{key}", merged[key], f"{value!r}, as {seen_at}", fix))
                data[key] = value
        target = _TARGETS[name]
        if path is None:
            unset.add(f"data.{target}")
        elif data.get(target) is not None:
            expected = f"nothing, since data.{target} is set"
            problems.append(Problem(f"{where}.data_path", path, expected, f"keep one of the two: data.{target}"))
        else:
            data[target] = path
    _single_validation_path(data, problems)
    return unset


def _section(data: dict[str, Any], name: str, problems: list[Problem]) -> dict[str, Any] | None:
    if name not in data:
        return None
    raw = data.pop(name)
    if raw is None:
        return None
    if not isinstance(raw, dict):
        fix = "give one local JSONL file: data.train_data_path, data.val_data_paths"
        problems.append(Problem(f"data.{name}", raw, "one dataset section", fix))
        return None
    return raw


def _dataset_path(section: dict[str, Any], where: str, problems: list[Problem], notes: list[str]) -> object:
    """The file that a dataset section names, or None with a problem."""
    name = section.get("dataset_name", FORMAT)
    if name != FORMAT:
        fix = "write the pairs as JSONL with prompt, chosen and rejected, and give that file as data_path"
        problems.append(Problem(f"{where}.dataset_name", name, FORMAT, fix))
        return None
    for key, value in section.items():
        if key in _IDLE:
            if value not in _IDLE[key]:
                fix = "remove it: the whole file is read as it is"
                shown = " or ".join("null" if idle is None else str(idle) for idle in _IDLE[key])
                problems.append(Problem(f"{where}.{key}", value, shown, fix))
            elif value is not None:
                notes.append(f"{where}.{key}: {value!r} has no effect: a local file has no splits")
        elif key not in (*_KEYS, "dataset_name", "data_path"):
            fix = f"known here: dataset_name, data_path, {', '.join((*_KEYS, *_IDLE))}"
            problems.append(Problem(f"{where}.{key}", value, "a known key; this one is not", fix))
    if section.get("data_path") is None:
        problems.append(Problem(f"{where}.data_path", None, "the path of a JSONL file", f"set {where}.data_path"))
    return section.get("data_path")


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
