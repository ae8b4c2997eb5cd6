"""Resolves `${...}` in a config with OmegaConf, as NeMo RL does. Values of environment variables are remembered, so that
they are written to no file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from megadpo.config.bounded import OverLimit, bounded
from megadpo.config.problems import ConfigError, Problem, first_line

_DEEPEST = 64
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Private-use characters. They mark the name of a variable while its place in a text is searched."""

_SHORTEST_HIDDEN = 4
"""Shorter values are not replaced inside a text: "no" in a sentence is hardly a variable's value."""


@dataclass(frozen=True)
class FromEnvironment:
    """A value that contains the value of an environment variable."""

    value: Any
    text: str
    """The text for files: with `${oc.env:NAME}`, which gives the same value in the same environment."""


Environment = Mapping[str, FromEnvironment]
"""Path of the key -> value. An item of a list has a path such as `path[0]`."""


def resolve(tree: dict[str, Any], problems: list[Problem]) -> tuple[dict[str, Any], dict[str, FromEnvironment]]:
    """A plain copy of `tree` with every `${...}` resolved, and the values that contain environment variables. A value that
    can't be resolved is added to `problems` and left out. Raises ConfigError for endless ones."""
    reading = _Interpolation(problems)
    try:
        with bounded():
            return reading.of(OmegaConf.create(tree), "", 0), reading.environment
    except OverLimit as error:
        fix = "write the values out"
        raise ConfigError(Problem("config", "${...}", f"interpolations that end; of these {error}", fix)) from error


class _Interpolation:
    def __init__(self, problems: list[Problem]) -> None:
        self.environment: dict[str, FromEnvironment] = {}
        self._problems = problems
        self._calls = 0
        self._names_instead = False
        for name, function in {**_ARITHMETIC, "oc.env": self._env}.items():
            OmegaConf.register_resolver(name, function, replace=True)

    def of(self, node: Any, path: str, depth: int) -> Any:
        if depth > _DEEPEST:
            start = ".".join(path.split(".")[:2])
            raise ConfigError(Problem(start, "${...}", "an interpolation that ends", "it contains itself: correct it"))
        keys: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
        plain: dict[Any, Any] = {}
        for key in keys:
            where = f"{path}[{key}]" if isinstance(node, ListConfig) else f"{path}.{key}" if path else str(key)
            if OmegaConf.is_missing(node, key):
                self._problems.append(Problem(where, "???", "a value", f"set {where}"))
                continue
            calls = self._calls
            try:
                value = node[key]
            except (OmegaConfBaseException, RecursionError) as error:
                expected = f"an interpolation that resolves ({first_line(error)})"
                self._problems.append(Problem(where, _raw(node, key), expected, "correct the ${...}"))
                continue
            if self._calls > calls:
                self.environment[where] = FromEnvironment(value, self._text(node, key))
            plain[str(key)] = self.of(value, where, depth + 1) if OmegaConf.is_config(value) else value
        return list(plain.values()) if isinstance(node, ListConfig) else plain

    def _env(self, name: str, *default: Any) -> Any:
        self._calls += 1
        if not self._names_instead:
            return oc.env(name, *default)
        words = "".join(", null" if one is None else f", '{one}'" for one in default)
        return f"{_OPEN}{name}{words}{_CLOSE}"

    def _text(self, node: Any, key: Any) -> str:
        """The value at `key` with variables' names in place of their values. If something was computed from a variable:
        the text of the config file."""
        self._names_instead = True
        try:
            text = node[key]
        except (OmegaConfBaseException, RecursionError):
            text = None
        finally:
            self._names_instead = False
        if not isinstance(text, str) or _OPEN not in text or re.search(rf"{_OPEN}[^{_CLOSE}]*['\\]{{2}}", text):
            return str(_raw(node, key))
        return escaped(text).replace(_OPEN, "${oc.env:").replace(_CLOSE, "}")


def escaped(text: str) -> str:
    """The text as a config file must write it, so that `${` is no interpolation."""
    return text.replace("${", "\\${")


def hidden(value: Any, environment: Environment, path: str = "") -> Any:
    """A resolved tree as it is written to files: texts are `escaped`, and values from environment variables are replaced by
    the variables' names. So is every other text that equals one of these values, since one key may copy another's."""
    if path in environment:
        return environment[path].text
    if isinstance(value, dict):
        return {name: hidden(one, environment, f"{path}.{name}" if path else name) for name, one in value.items()}
    if isinstance(value, list):
        return [hidden(one, environment, f"{path}[{number}]") for number, one in enumerate(value)]
    if not isinstance(value, str):
        return value
    return next((one.text for one in environment.values() if one.value == value), escaped(value))


def hidden_words(words: str, environment: Environment) -> str:
    """A text in which values from environment variables are replaced by the variables' names."""
    for one in environment.values():
        if isinstance(one.value, str) and len(one.value) >= _SHORTEST_HIDDEN:
            words = words.replace(one.value, one.text)
    return words


def _raw(node: Any, key: Any) -> Any:
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, (dict, list))
    return raw[key]


def _of_numbers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def checked(a: Any, b: Any) -> Any:
        if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (a, b)):
            raise ValueError(f"{a!r} and {b!r} are not two numbers")
        return function(a, b)

    return checked


_ARITHMETIC = {
    "add": _of_numbers(lambda a, b: a + b),
    "sub": _of_numbers(lambda a, b: a - b),
    "mul": _of_numbers(lambda a, b: a * b),
    "div": _of_numbers(lambda a, b: a / b),
    "max": _of_numbers(lambda a, b: max(a, b)),
}
"""NeMo RL's resolvers, as in ${mul:${policy.max_total_sequence_length},2}."""
