"""Reads a config as one plain mapping, the tree: YAML files with `defaults:`, command-line overrides and `${...}` (OmegaConf,
as in NeMo RL)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megadpo.config.interpolation import FromEnvironment, resolve
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.shipped import find_config, shipped_configs
from megadpo.config.yaml_text import MOST_BYTES, UNREADABLE, bad_places, parsed, reason
from megadpo.files.regular import read_at_most

_REPLACE = "_override_"


def read_tree(
    path: str | Path, overrides: Sequence[str], problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, FromEnvironment]]:
    """Reads `path`, merges it over its `defaults:`, applies the overrides, and resolves every interpolation. Also returns
    the values that contain environment variables.

    Raises ConfigError if nothing can be read (no file, no YAML, a cycle). Other problems are added to `problems`.
    """
    tree = _read_with_defaults(find_config(path), ())
    for override in overrides:
        apply_override(tree, override, problems)
    return resolve(tree, problems)


def get(tree: dict[str, Any], path: str, default: object = None) -> Any:
    """The value at a dotted path, or `default` if a part of the path is absent."""
    node: Any = tree
    for name in path.split("."):
        if not isinstance(node, dict) or name not in node:
            return default
        node = node[name]
    return node


def put(tree: dict[str, Any], path: str, value: object) -> None:
    """Sets a dotted path, and creates its sections. Does nothing if one of them is not a section."""
    *above, last = path.split(".")
    node = tree
    for name in above:
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            return
        node = inner
    node[last] = value


def drop(tree: dict[str, Any], path: str) -> None:
    """Removes a dotted path if it exists."""
    *above, last = path.split(".")
    node = get(tree, ".".join(above)) if above else tree
    if isinstance(node, dict):
        node.pop(last, None)


def _read_with_defaults(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    """One file merged over its defaults. `below`: the files that led here, to find a cycle."""
    content = _content(path, below)
    here = path.resolve()
    if here in below:
        chain = " -> ".join(str(one) for one in (*below[below.index(here) :], here))
        raise ConfigError(Problem(f"{below[-1]}: defaults", chain, "no cycle", "remove one of these defaults"))
    tree = _read_yaml(path, content)
    parents = tree.pop("defaults", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(one, str) for one in parents):
        expected = "a path or a list of paths, relative to this file"
        raise ConfigError(Problem(f"{path}: defaults", parents, expected, "write defaults: base.yaml"))
    problems = list(_bad_markers(tree, f"{path}: "))
    merged: dict[str, Any] = {}
    for parent in parents:
        try:
            read = _read_with_defaults(_parent(path, parent), (*below, here))
        except ConfigError as error:
            problems += error.problems
        else:
            merged = _merge(merged, read)
    if problems:
        raise ConfigError(problems)
    return _merge(merged, tree)


def _parent(child: Path, name: str) -> Path:
    """The file that a config's `defaults` names: relative to the config, or else the shipped config of that name."""
    beside = child.parent / os.path.expanduser(name)
    return beside if os.path.exists(beside) else shipped_configs().get(name, beside)


def _bad_markers(tree: dict[str, Any], where: str) -> Iterator[Problem]:
    """A problem for each `_override_` that is neither true nor false."""
    for key, value in tree.items():
        if isinstance(value, dict):
            marker = value.get(_REPLACE, True)
            if not isinstance(marker, bool):
                fix = "write true to replace the section of the defaults, or remove it"
                yield Problem(f"{where}{key}.{_REPLACE}", marker, "true or false", fix)
            yield from _bad_markers(value, f"{where}{key}.")


def _content(path: Path, below: tuple[Path, ...]) -> bytes:
    try:
        return read_at_most(path, MOST_BYTES)
    except OSError as error:
        where = f"{below[-1]}: defaults" if below else "config"
        expected = f"a readable YAML file ({error.strerror}), or a shipped config: {', '.join(shipped_configs())}"
        problem = Problem(where, str(path), expected, "check the path")
        raise ConfigError(problem) from error


def _read_yaml(path: Path, content: bytes) -> dict[str, Any]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        got = f"the byte 0x{content[error.start]:02x}"
        raise ConfigError(Problem(f"{path}:{line}", got, "UTF-8", "save the file in UTF-8")) from error
    try:
        bad = [Problem(f"{path}:{line}", *words) for line, *words in bad_places(text)]
        tree = {} if bad else parsed(text)
    except UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(Problem(at, reason(error), "valid YAML", "correct the line")) from error
    if bad:
        raise ConfigError(bad)
    if not isinstance(tree, dict):
        raise ConfigError(Problem(str(path), type(tree).__name__, "a mapping of sections", "write section: ... lines"))
    return tree


def _merge(base: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """`child` over `base`. Sections are merged, other values replaced. `_override_: true` in a section replaces the
    section."""
    merged = dict(base)
    for key, value in child.items():
        if isinstance(value, dict):
            replace = value.get(_REPLACE) is True
            value = {name: one for name, one in value.items() if name != _REPLACE}
            under = merged.get(key)
            merged[key] = _merge(under if isinstance(under, dict) and not replace else {}, value)
        else:
            merged[key] = value
    return merged


def apply_override(tree: dict[str, Any], override: str, problems: list[Problem]) -> None:
    """Applies `a.b=c`. Hydra's `+a.b=c` and `++a.b=c` mean the same here, since the schema has all keys. `~a.b` removes."""
    form = "key=value, as policy.precision=float32"
    name, equals, text = override.partition("=")
    sign = next((one for one in ("++", "+", "~") if name.startswith(one)), "")
    name = name.removeprefix(sign).strip()
    path = name.split(".")
    if not all(path) or name[:1] in "+~" or (not equals and sign != "~"):
        problems.append(Problem("command line", override, form, "write it so"))
        return
    known = len(problems)
    value = _override_value(name, override, text, problems) if equals else None
    if len(problems) > known:
        return
    if sign == "~":
        problems += _remove(tree, path, override, value, has_value=bool(equals))
        return
    holder = tree
    for depth, part in enumerate(path[:-1]):
        if holder.get(part) is None:
            holder[part] = {}
        if not isinstance(holder[part], dict):
            at = ".".join(path[: depth + 1])
            problems.append(Problem("command line", override, f"{at} to be a section", f"it is {holder[part]!r}"))
            return
        holder = holder[part]
    holder[path[-1]] = value


def _override_value(name: str, override: str, text: str, problems: list[Problem]) -> Any:
    """The value of `text` as YAML. With a problem the result has no meaning."""
    try:
        bad = [Problem(f"command line: {name}", *words) for _, *words in bad_places(text)]
        tree = OmegaConf.to_container(OmegaConf.from_dotlist([] if bad else [f"value={text}"]), resolve=False)
    except UNREADABLE as error:
        fix = f"""correct the value, or put it in quotes, inside those of the shell: '{name}="..."'"""
        bad, tree = [Problem("command line", override, f"a YAML value ({reason(error)})", fix)], {}
    problems += bad
    assert isinstance(tree, dict)
    return tree.get("value")


def _remove(tree: dict[str, Any], path: list[str], override: str, value: object, *, has_value: bool) -> list[Problem]:
    """Deletes the key at `path`. If a value is given, the key must have it, as in Hydra."""
    holder: Any = tree
    for part in path[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or path[-1] not in holder:
        return [Problem("command line", override, "a key that the file sets", "remove this argument")]
    if has_value and holder[path[-1]] != value:
        fix = f"correct the value, or write ~{'.'.join(path)} alone"
        return [Problem("command line", override, f"the value that is removed, {holder[path[-1]]!r}", fix)]
    del holder[path[-1]]
    return []
