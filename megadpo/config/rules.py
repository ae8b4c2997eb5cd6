"""What must hold between fields, whatever the model and the number of processes: the register of rules.

The rules are in rules_layout.py, rules_optimizer.py, rules_gpu.py and rules_run.py, which load.py imports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megadpo.config.problems import Problem
from megadpo.config.schema import Config

Rule = Callable[[Config], Iterator[Problem]]
_RULES: list[tuple[frozenset[str], Rule]] = []


def rule(*fields: str) -> Callable[[Rule], Rule]:
    """Register a rule; it is skipped where one of `fields` could not be read."""

    def register(holds: Rule) -> Rule:
        _RULES.append((frozenset(fields), holds))
        return holds

    return register


def broken_rules(cfg: Config, bad: frozenset[str] = frozenset()) -> list[Problem]:
    """Every rule that `cfg` breaks. `bad`: paths that hold a stand-in and must not be judged."""
    judged = [holds for fields, holds in _RULES if not any(covered(field, bad) for field in fields)]
    return [problem for holds in judged for problem in holds(cfg)]


def covered(path: str, bad: frozenset[str]) -> bool:
    """True when `path`, a section above it, or something inside it is in `bad`."""
    return any(path == one or path.startswith(one + ".") or one.startswith(path + ".") for one in bad)
