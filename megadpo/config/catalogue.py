"""Every key of a config with its type, default and meaning, read off the schema: docs/config.md and tools/config_keys.py.

A key's meaning is the string below its field in the schema, so that there is one place to write it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadpo.config.nemo_rl.no_effect import NO_EFFECT
from megadpo.config.nemo_rl.refused import REFUSED
from megadpo.config.reader import describe, keys_of, section_of
from megadpo.config.schema import Config

HEAD = """# Every key

Written from the schema by `python tools/config_keys.py --write docs/config.md`; a test compares the two. In a terminal,
`python tools/config_keys.py lr packing` prints the keys that have one of these words in their name or meaning. A key
that is not here is refused, with the nearest name that is; NeMo RL's other keys are at the end of this page.
"""
TOP = "Outside the sections"
REFUSED_HEAD = """## NeMo RL's keys that have one value here

Accepted at the values shown, or left out; any other value is refused for the reason given, since it would change the run.
"""
NO_EFFECT_HEAD = """## NeMo RL's keys without effect here

Accepted at any value, with a line in the log: nothing that they say can change a run.
"""


@dataclass(frozen=True)
class Entry:
    """One key of a config, in words."""

    path: str
    """Dotted, as on the command line."""
    expected: str
    """Its type and range, in words."""
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys directly below one section; `path` is empty for the whole config."""

    path: str
    meaning: str
    keys: tuple[Entry, ...]


def sections() -> list[Section]:
    """Every section of a config, in the schema's order, those inside behind the one that holds them."""
    return list(_sections(Config, ""))


def page() -> str:
    """docs/config.md."""
    parts = [HEAD]
    for section in sections():
        if section.keys:
            rows = [
                (f"`{key.path.rpartition('.')[2]}`", key.expected, key.default, key.meaning) for key in section.keys
            ]
            table = _table(("key", "value", "default", "meaning"), rows)
            parts.append("\n\n".join(filter(None, [f"## {section.path or TOP}", section.meaning, table])))
    refused = [
        (f"`{one.path}`", " or ".join(dict.fromkeys(map(_yaml, one.accepted))), f"{one.reason}; {one.fix}")
        for one in REFUSED
    ]
    parts.append(REFUSED_HEAD + "\n" + _table(("key", "accepted", "why not others, and what to do"), refused))
    no_effect = [(f"`{path}`", reason) for path, reason in NO_EFFECT.items()]
    parts.append(NO_EFFECT_HEAD + "\n" + _table(("key", "why"), no_effect))
    return "\n".join(parts)


def _sections(cls: type, path: str) -> Iterator[Section]:
    keys, inner = [], []
    for name, key in keys_of(cls).items():
        where = f"{path}.{name}" if path else name
        below = section_of(key.annotation)
        if below is not None:
            inner.append((below, where))
        else:
            meaning = key.meaning or _field_docs(key.owner).get(name, "")
            keys.append(Entry(where, describe(key.annotation), _default(key.default, meaning), meaning))
    meaning = _one_line(inspect.getdoc(cls) or "").removeprefix(f"`{path}`").lstrip(".: ") if path else ""
    yield Section(path, meaning[:1].upper() + meaning[1:], tuple(keys))
    for below, where in inner:
        yield from _sections(below, where)


def _default(default: object, meaning: str) -> str:
    if "Left out" in meaning:
        return "derived"
    return "required" if default is dataclasses.MISSING else _yaml(default)


def _yaml(value: object) -> str:
    """A value as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_yaml, value))}]"
    return '""' if value == "" else str(value)


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal that follows the field in the source of `cls`."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = _one_line(text)
    return docs


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
