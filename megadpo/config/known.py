"""Rules, and what they may use: all that is known of a run at a time.

A rule says what must hold between values. The rules of this room are in the modules that load.py imports; a variant has
its own (variants.py). Rules run when the config is read, with the config alone, and again when the model's architecture,
the number of processes and the machine are known.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megadpo.config.architecture import Architecture
from megadpo.config.problems import Problem, covered
from megadpo.config.schema import Config
from megadpo.config.variants import KINDS, option_fields


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a run, as variants see it."""

    device: Literal["cpu", "cuda"]
    compute_capability: tuple[int, int] | None = None
    """The GPU's, such as (9, 0) for Hopper."""
    cuda_version: tuple[int, int] | None = None
    """The version that torch was built for."""
    why_missing: Callable[[str], str | None] = lambda name: None
    """Why a Python package such as transformer_engine, or MIXED_PRODUCTS, can't be used; None if it can."""


INSTALL = "install the 'gpu' extra (pip install megadpo[gpu], see docs/gpu.md)"
MIXED_PRODUCTS = "products of bfloat16 matrices in float32"
"""torch can multiply bfloat16 matrices into a float32 one, and add the product to one, without rounding it first."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a variant or a rule may use to find problems. None: not known yet; then it finds no problem that needs it."""

    cfg: Config
    arch: Architecture | None = None
    world_size: int | None = None
    """Processes of the run."""
    machine: Machine | None = None

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """The run's device. auto: not known."""
        return self.cfg.policy.device if self.machine is None else self.machine.device


Rule = Callable[[Known], Iterator[Problem]]
_RULES: list[Rule] = []


def rule(holds: Rule) -> Rule:
    """Decorator: registers a rule, which yields a Problem for everything in `known` that doesn't hold."""
    _RULES.append(holds)
    return holds


def find_problems(known: Known, unread: frozenset[str] = frozenset()) -> list[Problem]:
    """The problems that all rules find, also those of variants.

    unread: keys whose value could not be read; the config has a placeholder there. A rule stops when it reads one.
    """
    if unread:
        guarded: Any = _Guard(known.cfg, "", unread)
        known = dataclasses.replace(known, cfg=guarded)
    checks: list[Rule] = [*_RULES, *(kind.problems for kind in KINDS)]
    return [problem for check in checks for problem in _until_unread(check(known))]


class _Unread(Exception):
    """A rule has asked for a value that could not be read."""


def _until_unread(problems: Iterator[Problem]) -> Iterator[Problem]:
    try:
        yield from problems
    except _Unread:
        return


class _Guard:
    """Wraps a section of a config, and raises _Unread for a value that could not be read."""

    def __init__(self, section: Any, path: str, unread: frozenset[str]) -> None:
        self._section, self._path, self._unread = section, path, unread

    @property  # type: ignore[misc]  # isinstance() sees the section's own type
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
            return _GuardedOptions(value, self._path, self._unread)
        if dataclasses.is_dataclass(value):
            return _Guard(value, path, self._unread)
        if covered(path, self._unread):
            raise _Unread(path)
        return value


class _GuardedOptions(Mapping[str, Any]):
    """The same for options of variants, which are keys of the section `path`."""

    def __init__(self, options: Mapping[str, Any], path: str, unread: frozenset[str]) -> None:
        self._options, self._path, self._unread = options, path, unread

    def __getitem__(self, name: str) -> Any:
        path = f"{self._path}.{name}"
        if covered(path, self._unread) and not dataclasses.is_dataclass(self._options[name]):
            raise _Unread(name)
        value = self._options[name]
        return _Guard(value, path, self._unread) if dataclasses.is_dataclass(value) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)
