"""NeMo RL's keys that megadpo does not implement: taken out of a config with a refusal or a note, never in silence."""

from __future__ import annotations

from typing import Any

from megadpo.config.nemo_rl.no_effect import NO_EFFECT
from megadpo.config.nemo_rl.refused import REFUSED, Refused
from megadpo.config.problems import Problem

_REFUSED_BY_PATH = {entry.path: entry for entry in REFUSED}
KNOWN_PATHS: frozenset[str] = frozenset(_REFUSED_BY_PATH) | frozenset(
    path for path in NO_EFFECT if not path.endswith(".*")
)


def strip_foreign(tree: dict[str, Any], schema_paths: frozenset[str]) -> tuple[list[Problem], list[str]]:
    """Take NeMo RL's foreign keys out of `tree`, in place. Keys that are in the schema too are checked and stay.

    Returns the refusals, and one note for each key or section that was accepted without effect.
    """
    problems: list[Problem] = []
    notes: list[str] = []
    _strip(tree, "", schema_paths, problems, notes)
    return problems, notes


def _strip(
    node: dict[str, Any], prefix: str, schema_paths: frozenset[str], problems: list[Problem], notes: list[str]
) -> None:
    for key, value in list(node.items()):
        path = f"{prefix}{key}"
        if path in _REFUSED_BY_PATH:
            refusal = _refusal(_REFUSED_BY_PATH[path], value)
            if refusal is not None:
                problems.append(refusal)
            if refusal is not None or value is None or path not in schema_paths:
                del node[key]
        elif path in NO_EFFECT:
            notes.append(f"{path}: {value!r} has no effect: {NO_EFFECT[path]}")
            del node[key]
        elif path in _FOREIGN_SECTIONS and path not in schema_paths:
            if isinstance(value, dict):
                reason = NO_EFFECT.get(f"{path}.*")
                idle = [str(name) for name in value if f"{path}.{name}" not in _REFUSED_BY_PATH]
                _strip(value, f"{path}.", schema_paths, problems, notes)
                if reason is not None and idle:
                    notes.append(f"{path}.{{{', '.join(idle)}}}: no effect: {reason}")
                if reason is not None or not value:
                    del node[key]
            else:
                if value is not None:
                    problems.append(Problem(path, value, "a section or null", "set it to null"))
                del node[key]
        elif isinstance(value, dict):
            _strip(value, f"{path}.", schema_paths, problems, notes)


def _refusal(entry: Refused, value: object) -> Problem | None:
    if any(type(value) is type(allowed) and value == allowed for allowed in entry.accepted):
        return None
    shown = [str(allowed).lower() for allowed in entry.accepted if allowed not in (None, {}, [])]
    if None in entry.accepted:
        shown.append("null")
    return Problem(entry.path, value, f"{' or '.join(shown)} ({entry.reason})", entry.fix)


def _sections(paths: frozenset[str]) -> frozenset[str]:
    """Every section that holds one of `paths`."""
    return frozenset(path[:dot] for path in paths for dot, letter in enumerate(path) if letter == ".")


_FOREIGN_SECTIONS = _sections(frozenset(_REFUSED_BY_PATH) | frozenset(NO_EFFECT))
