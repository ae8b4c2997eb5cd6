"""Makes docs/config.md, the tables in docs/losses.md and docs/families.md, and the output of `megadpo keys`, from the schema
and the variants.

A key's meaning is the string below its field. A loss's formula and source are in its docstring.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadpo.config.nemo_rl.translate import NemoKey, nemo_keys
from megadpo.config.reader import keys_of, section_of
from megadpo.config.schema import Config
from megadpo.config.types import describe
from megadpo.config.variants import ATTENTION_KERNELS, LOSSES, option_fields, variant_options

HEAD = """# Every key

Written from the schema by `megadpo keys --write docs`; a test compares the two. In a terminal,
`megadpo keys lr packing` prints the keys that have one of these words in their name or meaning. A key
that is not here is refused, with the nearest name that is. Accepted too are:

- `defaults`: the file, or a list of the files, that this one inherits: paths, or names of shipped configs. Sections are merged,
  other values replaced; `_override_: true` in a section replaces the inherited section.
- `data.train`, `data.validation` and `data.default`: NeMo RL's sections of data ([data.md](data.md#folders-and-the-hub)).
- NeMo RL's other keys, at the end of this page.
"""
TOP = "Outside the sections"
LIMITED_HEAD = """## NeMo RL's keys that have fewer values here

Accepted at the values shown, which mean what megadpo does anyway, or left out; any other value is refused for the reason
given, since ignoring it would change numbers: by models with experts only where it says so.
"""
NO_EFFECT_HEAD = """## NeMo RL's keys without effect here

Accepted at any value: nothing that they say changes a number. One line of the log names those that ask for something.
"""
KERNELS_BEGIN, KERNELS_END = "<!-- kernels: written by megadpo keys -->", "<!-- end of the kernels -->"
LOSSES_BEGIN, LOSSES_END = "<!-- losses: written by megadpo keys -->", "<!-- end of the losses -->"


@dataclass(frozen=True)
class KeyEntry:
    """One key of a config, as text."""

    path: str
    """Dotted, as on the command line."""
    expected: str
    """Its type and range."""
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys directly below one section; `path` is empty for the whole config."""

    path: str
    meaning: str
    keys: tuple[KeyEntry, ...]


def sections() -> list[Section]:
    """Every section of a config in the schema's order; a section comes before those inside it."""
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
            meaning = textwrap.fill(section.meaning, 130, break_long_words=False, break_on_hyphens=False)
            parts.append("\n\n".join(filter(None, [f"## {section.path or TOP}", meaning, table])))
    limited = [
        (f"`{one.path}`", _accepted(one), "; ".join(filter(None, (one.why, one.fix))))
        for one in nemo_keys().values()
        if one.accepted is not None or one.in_schema
    ]
    parts.append(LIMITED_HEAD + "\n" + _table(("key", "accepted", "why not others, and what to do"), limited))
    no_effect = [
        (f"`{one.path}`", one.why) for one in nemo_keys().values() if one.accepted is None and not one.in_schema
    ]
    parts.append(NO_EFFECT_HEAD + "\n" + _table(("key", "why"), no_effect))
    return "\n".join(parts)


def with_losses(text: str) -> str:
    """docs/losses.md with a new table of losses between its two marks."""
    rows = []
    for name in LOSSES.names():
        loss = LOSSES[name]
        summary = _one_line((inspect.getdoc(loss) or "").split("\n\n")[0])
        formula, _, source = summary.replace(", [P]", "", 1).partition(" Source: ")
        needs = [f"`{loss.settings()}`"] * bool(loss.settings())
        options = [f"`{option}`" for option in variant_options(loss)]
        rows.append((f"`{name}`", formula, ", ".join([*needs, *options]), _links(source)))
    table = _table(("`loss_type`", "loss of one pair", "needs, options", "source"), rows)
    return _between(text, LOSSES_BEGIN, LOSSES_END, table)


def with_kernels(text: str) -> str:
    """docs/families.md with a new table of attention kernels between its two marks."""
    kernels = [ATTENTION_KERNELS[name] for name in ATTENTION_KERNELS.names()]
    rows = [
        (words, *(kernel.computes.get(feature, "refused") for kernel in kernels))
        for feature, words in kernels[0].FEATURES.items()
    ]
    rows.append(("widest head", *(str(kernel.most_width or "any") for kernel in kernels)))
    return _between(text, KERNELS_BEGIN, KERNELS_END, _table(("", *(f"`{kernel.name}`" for kernel in kernels)), rows))


def _between(text: str, begin: str, end: str, table: str) -> str:
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{table}{end}{after}"


def _links(text: str) -> str:
    """The text with its addresses as Markdown links."""
    return re.sub(r"https://(\S+[^\s.,;:])", lambda found: f"[{found[1]}]({found[0]})", text)


def _sections(cls: type, path: str) -> Iterator[Section]:
    keys, inner = [], []
    for name, key in keys_of(cls).items():
        where = f"{path}.{name}" if path else name
        below = section_of(key.annotation)
        if below is not None:
            inner.append((below, where))
        else:
            meaning = key.meaning or _field_docs(key.owner).get(name, "")
            kinds = [kind for kind in option_fields(cls).values() if name in kind.keys()]  # noqa: SIM118  no dict
            if readers := [reader for kind in kinds for reader in kind.readers(name)]:
                meaning += f" Read by {', '.join(readers)}."
            keys.append(KeyEntry(where, describe(key.annotation), _default(key.default, meaning), meaning))
    meaning = _one_line(inspect.getdoc(cls) or "").removeprefix(f"`{path}`").lstrip(".: ") if path else ""
    yield Section(path, meaning[:1].upper() + meaning[1:], tuple(keys))
    for below, where in inner:
        yield from _sections(below, where)


def _accepted(key: NemoKey) -> str:
    of_experts = ", or the model has no experts" * key.experts
    if key.accepted is None:
        return f"as above, in {key.path.rpartition('.')[0]}{of_experts}"
    return " or ".join(dict.fromkeys(map(_yaml, key.accepted))) + of_experts


def _default(default: object, meaning: str) -> str:
    if "Left out" in meaning:
        return "derived"
    return "required" if default is dataclasses.MISSING else _yaml(default)


def _yaml(value: object) -> str:
    """A value as YAML."""
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
