"""What must hold between fields: the rules of this room, and those that variants bring (variants.py).

The rules of this room are in the modules `rules_*.py`, which load.py imports.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.schema import Config
from megadpo.config.variants import KINDS, option_fields

Rule = Callable[[Config], Iterator[Problem]]
_RULES: list[Rule] = []


def rule(holds: Rule) -> Rule:
    """Decorator: register a rule."""
    _RULES.append(holds)
    return holds


def broken_rules(cfg: Config, bad: frozenset[str] = frozenset()) -> list[Problem]:
    """Every rule that `cfg` breaks, the variants' own included.

    bad: paths that hold a stand-in, since their value could not be read. A rule ends where it reads one of them.
    """
    guarded: Any = _Guard(cfg, "", bad) if bad else cfg
    checks = [functools.partial(holds, guarded) for holds in _RULES]
    checks += [functools.partial(kind.problems, Known(cfg=guarded)) for kind in KINDS]
    return [problem for check in checks for problem in _until_unread(check())]


def covered(path: str, bad: frozenset[str]) -> bool:
    """True when `path`, a section above it, or something inside it is in `bad`."""
    return any(path == one or path.startswith(one + ".") or one.startswith((path + ".", path + "[")) for one in bad)


class _Unread(Exception):
    """A rule reads a value that could not be read."""


def _until_unread(problems: Iterator[Problem]) -> Iterator[Problem]:
    try:
        yield from problems
    except _Unread:
        return


class _Guard:
    """A section of a config that raises _Unread where a value is asked for that could not be read."""

    def __init__(self, section: Any, path: str, bad: frozenset[str]) -> None:
        self._section, self._path, self._bad = section, path, bad

    @property  # type: ignore[misc]  # what asks for the section's type gets that
    def __class__(self) -> Any:
        return type(self._section)

    def __getattr__(self, name: str) -> Any:
        of_class = inspect.getattr_static(type(self._section), name, None)
        if isinstance(of_class, property):
            assert of_class.fget is not None
            return of_class.fget(self)
        if inspect.isfunction(of_class):
            return functools.partial(of_class, self)
        value, path = getattr(self._section, name), f"{self._path}.{name}".lstrip(".")
        if name in option_fields(self.__class__):
            return _GuardedOptions(value, self._path, self._bad)
        if dataclasses.is_dataclass(value):
            return _Guard(value, path, self._bad)
        if covered(path, self._bad):
            raise _Unread(path)
        return value


class _GuardedOptions(Mapping[str, Any]):
    """Options of variants, which are keys of the section `path`."""

    def __init__(self, options: Mapping[str, Any], path: str, bad: frozenset[str]) -> None:
        self._options, self._path, self._bad = options, path, bad

    def __getitem__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        if covered(path, self._bad) and not dataclasses.is_dataclass(self._options[name]):
            raise _Unread(name)
        value = self._options[name]
        return _Guard(value, path, self._bad) if dataclasses.is_dataclass(value) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)
