"""Parses YAML text into plain data, and finds places where YAML reads something else than the text seems to say."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megadpo.config.problems import first_line

MOST_BYTES = 4 * 2**20
"""Limit on the size of a config file."""
_MOST_VALUES = 100_000
"""Limit on the values of a file with its aliases expanded. (Nine lines of ten aliases each expand to 10**9.)"""

UNREADABLE = (
    yaml.YAMLError,
    OmegaConfBaseException,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)
"""The exceptions of `bad_places` and `parsed` for text that is not YAML, or has a value that is not of its tag's type (`!!float
x` raises ValueError, `!!bool x` KeyError, `!!timestamp x` AttributeError)."""

Place = tuple[int, str, str, str]
"""(line, value, expected, fix)."""


def parsed(text: str) -> Any:
    """The YAML text as plain data. Raises UNREADABLE."""
    try:
        # OmegaConf's loader refuses duplicate keys and reads 5e-6 as a number.
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except (OSError, AssertionError):  # OmegaConf raises these for a scalar
        return yaml.safe_load(text)


def reason(error: Exception) -> str:
    """What is wrong. error: one of UNREADABLE."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    what = getattr(error, "problem", None) or first_line(error)
    is_syntax = isinstance(error, (yaml.YAMLError, OmegaConfBaseException))
    return what if is_syntax else f"a value that is not of the type its tag says ({what})"


def bad_places(text: str) -> list[Place]:
    """Aliases that contain themselves or expand to too many values, and keys that YAML doesn't read as text. Raises
    UNREADABLE."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return []
    return list(_endless(root)) or list(_bad_keys(root))


def _endless(root: yaml.Node) -> Iterator[Place]:
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        """Number of values of the node, with its aliases expanded."""
        if id(node) in open_nodes:
            raise _ContainsItself(node.start_mark.line + 1)
        if id(node) not in sizes:
            open_nodes.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            open_nodes.remove(id(node))
        return sizes[id(node)]

    try:
        count = size(root)
    except _ContainsItself as error:
        yield error.line, "an alias inside what it stands for", "values that end", "write the value out"
        return
    if count > _MOST_VALUES:
        yield 1, f"aliases for {count} values", f"at most {_MOST_VALUES}", "write out what is meant"


class _ContainsItself(Exception):
    def __init__(self, line: int) -> None:
        super().__init__(line)
        self.line = line


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _bad_keys(root: yaml.Node) -> Iterator[Place]:
    """Keys that YAML doesn't read as text: the key of `no: norwegian.jsonl` would be False, and `1: a` and `01: b` would be
    one key."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        nodes += list(_children(node))
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            kind = key.tag.rpartition(":")[2]
            whole = kind == "int" and key.value.isascii() and key.value.isdigit() and str(int(key.value)) == key.value
            if kind not in ("str", "merge") and not whole:
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                yield key.start_mark.line + 1, f"the key {shown}", f"text; YAML reads it as {kind}", "put it in quotes"
