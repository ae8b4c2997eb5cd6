"""What is known of a run, and every problem that follows from it.

A rule says what must hold between values. The rules of this room are in the modules that load.py imports; a variant
brings its own (variants.py). All are asked in the same way: with the config alone when it is read, and with the model's
architecture, the number of processes and the machine where these are known.
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
    """What a variant may ask of the machine that a run is on."""

    device: Literal["cpu", "cuda"]
    compute_capability: tuple[int, int] | None = None
    """Of the GPU, e.g. (9, 0) for Hopper."""
    cuda_version: tuple[int, int] | None = None
    """That torch was built for."""
    why_missing: Callable[[str], str | None] = lambda name: None
    """Why a Python package such as transformer_engine, or MIXED_PRODUCTS, can't be used; None where it can."""


INSTALL = "install the 'gpu' extra (pip install megadpo[gpu], see docs/gpu.md)"
MIXED_PRODUCTS = "products of bfloat16 matrices in float32"
"""torch multiplies bfloat16 matrices into a float32 one, and adds to it, without rounding in between."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known when a variant or a rule is asked for problems. None: not known, and what depends on it is not judged."""

    cfg: Config
    arch: Architecture | None = None
    world_size: int | None = None
    """Processes of the run."""
    machine: Machine | None = None

    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]:
        """Of the run. auto: not known."""
        return self.cfg.policy.device if self.machine is None else self.machine.device


Rule = Callable[[Known], Iterator[Problem]]
_RULES: list[Rule] = []


def rule(holds: Rule) -> Rule:
    """Decorator: register a rule. It yields a Problem for everything that doesn't hold, as far as `known` says."""
    _RULES.append(holds)
    return holds


def find_problems(known: Known, unread: frozenset[str] = frozenset()) -> list[Problem]:
    """Every rule that is broken, the variants' own included.

    unread: keys that hold a stand-in, since their value could not be read. A rule ends where it reads one of them.
    """
    if unread:
        guarded: Any = _Guard(known.cfg, "", unread)
        known = dataclasses.replace(known, cfg=guarded)
    checks: list[Rule] = [*_RULES, *(kind.problems for kind in KINDS)]
    return [problem for check in checks for problem in _until_unread(check(known))]


class _Unread(Exception):
    """A rule reads a value that could not be read."""


def _until_unread(problems: Iterator[Problem]) -> Iterator[Problem]:
    try:
        yield from problems
    except _Unread:
        return


class _Guard:
    """A section of a config that raises _Unread where a value is asked for that could not be read."""

    def __init__(self, section: Any, path: str, unread: frozenset[str]) -> None:
        self._section, self._path, self._unread = section, path, unread

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
            return _GuardedOptions(value, self._path, self._unread)
        if dataclasses.is_dataclass(value):
            return _Guard(value, path, self._unread)
        if covered(path, self._unread):
            raise _Unread(path)
        return value


class _GuardedOptions(Mapping[str, Any]):
    """Options of variants, which are keys of the section `path`."""

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
