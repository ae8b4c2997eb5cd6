"""Reads a plain mapping into a dataclass by its annotations, and collects every problem."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from megadpo.config.problems import Problem
from megadpo.config.types import FitsPath, NotEmpty, Range, describe, literal_text, unwrap
from megadpo.config.variants import Key, OneOf, default_of, option_fields

Section = TypeVar("Section")


@dataclasses.dataclass
class Reader:
    """Reads one config and keeps its problems."""

    known_paths: frozenset[str]
    """All keys, to suggest one for an unknown key."""
    problems: list[Problem] = dataclasses.field(default_factory=list)
    bad: set[str] = dataclasses.field(default_factory=set)
    """Paths whose value could not be read; the result holds the default there."""

    def section(self, cls: type[Section], raw: object, path: str) -> Section:
        """Reads dataclass `cls` from mapping `raw`. A missing or wrong value becomes the default, or a blank one."""
        if not isinstance(raw, Mapping):
            fix = "write its keys below it, or leave the section out"
            self._problem(path, raw, "a section (keys with values)", fix)
            raw = {}
        keys = keys_of(cls)
        values: dict[str, Any] = {}
        for name, key in keys.items():
            where = f"{path}.{name}" if path else name
            required = key.default is dataclasses.MISSING
            if name in raw:
                failures = len(self.problems)
                value = self.value(key.annotation, raw[name], where)
                if len(self.problems) == failures or dataclasses.is_dataclass(value):
                    values[name] = value
                    continue
            elif required:
                fix = f"set {where} in the file or on the command line"
                self._problem(where, None, f"{describe(key.annotation)}; it is required", fix)
            values[name] = self._blank(key.annotation, where) if required else key.default
        for name in raw:
            if name not in keys:
                self._unknown(f"{path}.{name}" if path else str(name), raw[name], list(keys))
        for field, kind in option_fields(cls).items():  # type: ignore[arg-type]
            values[field] = {name: values.pop(name) for name in kind.keys()}  # noqa: SIM118  a method of the kind
        return cls(**values)

    def value(self, annotation: Any, raw: object, where: str) -> Any:
        """Reads one value by its annotation. On a problem the result has no meaning, and `where` is in `bad`."""
        options, bounds = unwrap(annotation)
        if type(None) in options:
            if raw is None:
                return None
            options = [option for option in options if option is not type(None)]
        kind = dict if isinstance(raw, Mapping) else tuple if isinstance(raw, (list, tuple)) else None
        option = next((one for one in options if kind is not None and get_origin(one) is kind), options[0])
        origin = get_origin(option)
        if dataclasses.is_dataclass(option):
            return self.section(option, raw, where)  # type: ignore[arg-type]
        names = next((mark.allowed() for mark in bounds if isinstance(mark, OneOf)), None)
        if origin is Literal or names is not None:
            allowed = get_args(option) if names is None else names
            if any(type(raw) is type(one) and raw == one for one in allowed):
                return raw
            near = difflib.get_close_matches(str(raw), [str(one) for one in allowed], n=1, cutoff=0.4)
            fix = f"did you mean {near[0]}?" if near else f"set it to {literal_text(allowed[0])}"
            return self._problem(where, raw, describe(annotation), fix)
        if origin is dict:
            return self._mapping(get_args(option)[1], raw, where, annotation)
        if origin is tuple:
            if not isinstance(raw, (list, tuple)):
                return self._problem(where, raw, describe(annotation), "write it as [a, b]")
            return tuple(self.value(get_args(option)[0], one, f"{where}[{i}]") for i, one in enumerate(raw))
        if option is Any:
            return raw
        return self._scalar(option, bounds, raw, where, annotation)

    def _mapping(self, inner: Any, raw: object, where: str, annotation: Any) -> Any:
        if not isinstance(raw, Mapping):
            return self._problem(where, raw, describe(annotation), "write it as {name: value}")
        return {str(name): self.value(inner, one, f"{where}.{name}") for name, one in raw.items()}

    def _scalar(self, kind: Any, bounds: list[Any], raw: Any, where: str, annotation: Any) -> Any:
        expected = describe(annotation)
        value: Any = raw
        if kind is float and isinstance(raw, str):
            # YAML 1.1 reads 5e-6 (no dot) as text.
            try:
                value = float(raw)
            except ValueError:
                return self._problem(where, raw, expected, "write a number, for example 5.0e-6")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:
                return self._problem(where, raw, expected, "write a finite number")
        if type(value) is not kind:
            return self._problem(where, raw, expected, _type_fix(kind, raw, where))
        if kind is str and (problem := _not_text(value)):
            return self._problem(where, raw, f"{expected} without {problem}", "remove it")
        if kind is float and not math.isfinite(value):
            return self._problem(where, raw, expected, "write a finite number")
        for bound in bounds:
            if isinstance(bound, Range) and not bound.holds(value):
                return self._problem(where, raw, expected, f"choose a value {bound}")
            if isinstance(bound, NotEmpty) and not value.strip():
                return self._problem(where, raw, expected, "fill it in")
            if isinstance(bound, FitsPath) and not bound.holds(value):
                limit = f"a path of at most {bound.most_bytes} bytes, each name in it of {bound.most_name_bytes}"
                return self._problem(where, raw, limit, "shorten it")
        return value

    def _blank(self, annotation: Any, where: str) -> Any:
        """A placeholder for a value that could not be read, so that the rest can be read."""
        option = unwrap(annotation)[0][0]
        if dataclasses.is_dataclass(option):
            return Reader(self.known_paths).section(option, {}, where)  # type: ignore[arg-type]
        return option() if option in (str, int, float, bool) else None

    def _unknown(self, where: str, value: object, siblings: list[str]) -> None:
        fix = "remove it"
        name = where.rpartition(".")[2]
        near_section = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
        meant = name in names_elsewhere() and isinstance(value, Mapping) and not names_elsewhere().keys() & value.keys()
        if isinstance(value, Mapping) and value and not (meant or near_section or name in self._sections):
            for key, one in value.items():  # another trainer's section: its keys may have different places here
                self._unknown(f"{where}.{key}", one, [])
            return
        nearest = nearest_name(where, siblings, self.known_paths)
        if nearest:
            fix = f"did you mean {nearest}? Otherwise remove it"
        elif siblings and len(siblings) <= 12:
            fix = f"remove it; known here: {', '.join(siblings)}"
        self._problem(where, value, "a known key; this one is not", fix)

    @functools.cached_property
    def _sections(self) -> frozenset[str]:
        """The last names of all sections."""
        return frozenset(path.split(".")[-2] for path in self.known_paths if "." in path)

    def _problem(self, where: str, value: object, expected: str, fix: str) -> None:
        self.problems.append(Problem(where, value, expected, fix))
        self.bad.add(where)


def nearest_name(where: str, siblings: list[str], known_paths: frozenset[str]) -> str | None:
    """The dotted key that was most likely meant by the unknown key `where`, or None."""
    section, _, name = where.rpartition(".")
    elsewhere = names_elsewhere().get(name)
    if elsewhere in known_paths:
        return elsewhere
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if near:
        return f"{section}.{near[0]}" if section else near[0]
    leaves: dict[str, list[str]] = {}
    for path in known_paths:
        leaves.setdefault(path.rpartition(".")[2], []).append(path)
    near = difflib.get_close_matches(name, sorted(leaves), n=1, cutoff=0.8)
    # not for a name that several sections have, such as name or enabled: it is unclear which is meant
    return leaves[near[0]][0] if near and len(leaves[near[0]]) == 1 else None


def dotted_paths(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all keys of dataclass `cls`, also of sections."""
    for name, key in keys_of(cls).items():
        yield f"{prefix}{name}"
        below = section_of(key.annotation)
        if below is not None:
            yield from dotted_paths(below, f"{prefix}{name}.")


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, annotation) of all keys of dataclass `cls` that are no sections."""
    for name, key in keys_of(cls).items():
        below = section_of(key.annotation)
        if below is None:
            yield f"{prefix}{name}", key.annotation
        else:
            yield from leaves(below, f"{prefix}{name}.")


def section_of(annotation: Any) -> type | None:
    """The dataclass of a section; None for the annotation of a value."""
    option = unwrap(annotation)[0][0]
    return option if dataclasses.is_dataclass(option) else None  # type: ignore[return-value]


def _not_text(value: str) -> str | None:
    """A character in `value` that paths or UTF-8 can't contain; None if there is none."""
    if "\0" in value:
        return "the character NUL"
    half = next((character for character in value if "\ud800" <= character <= "\udfff"), None)
    return None if half is None else f"the half character {half!a}"


def _type_fix(kind: type, raw: object, where: str) -> str:
    if kind is bool:
        return "write true or false, without quotes"
    if kind is str:
        quotes = f"""put it in quotes; on the command line inside those of the shell: '{where}="..."'"""
        return quotes if isinstance(raw, (int, float)) else "write text"
    if kind is int and isinstance(raw, float):
        return f"write {int(raw)}" if raw.is_integer() else "write a whole number"
    return "write a number, without quotes"


@functools.cache
def names_elsewhere() -> dict[str, str]:
    """Another trainer's name of a key -> our key, from other_trainers.yaml."""
    text = Path(__file__).with_name("other_trainers.yaml").read_text(encoding="utf-8")
    table = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the C loader is ten times as fast
    return {name: key for key, names in table.items() for name in names}


def keys_of(cls: type) -> dict[str, Key]:
    """The keys of a section in the schema's order: the fields of its dataclass, and in place of a field that holds options
    of variants, these options."""
    keys: dict[str, Key] = {}
    holders = option_fields(cls)
    for name, (annotation, field) in _fields(cls).items():
        keys |= holders[name].keys() if name in holders else {name: Key(annotation, default_of(field), cls)}
    return keys


@functools.cache
def _fields(cls: Any) -> dict[str, tuple[Any, dataclasses.Field[Any]]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    # compare=False marks fields that the loader fills and a file can't set.
    return {field.name: (hints[field.name], field) for field in dataclasses.fields(cls) if field.compare}
