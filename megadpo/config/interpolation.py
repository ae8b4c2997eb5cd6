"""`${...}` in a config: filled in by OmegaConf as NeMo RL does, with what comes from the environment remembered, so that
no file holds it."""

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
"""Private characters around the name of a variable, while its place in a text is looked for."""

_SHORTEST_HIDDEN = 4
"""Characters of a value that is looked for inside of words: each "no" of a report is not a variable's."""


@dataclass(frozen=True)
class FromEnvironment:
    """A value that holds one of an environment variable."""

    value: Any
    text: str
    """What stands for it in a file: with `${oc.env:NAME}`, which is the same value in the same environment."""


Environment = Mapping[str, FromEnvironment]
"""By the path of the key; items of lists as path[0]."""


def resolve(tree: dict[str, Any], problems: list[Problem]) -> tuple[dict[str, Any], dict[str, FromEnvironment]]:
    """A plain copy of `tree` with every `${...}` filled in, and which values hold environment variables. What can't be
    filled in is added to `problems` and left out. Raises ConfigError for one without end."""
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
        """The value at `key`, with the names of variables for their values; as the file has it, where something was
        computed from them."""
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
    """A text as a config holds it, where `${` stands for itself."""
    return text.replace("${", "\\${")


def hidden(value: Any, environment: Environment, path: str = "") -> Any:
    """`value`, a resolved tree, as files hold it: with `escaped` texts, and for what is an environment variable's value
    the name of that. So is every other text that is the same as one of those: keys may take a value from another."""
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
    """Words of a report, with the names of variables for their values."""
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
"""NeMo RL's, as in ${mul:${policy.max_total_sequence_length},2}."""
