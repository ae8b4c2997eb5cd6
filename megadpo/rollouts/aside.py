"""What is left out, written to a file of its own, and counted by reason with the first places."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TextIO

from megadpo.rollouts.reasons import REASONS

MOST_EXAMPLES = 3
"""Places a report names for a reason; the file has all."""

_MAX_LINE_BYTES = 2**20


@dataclass
class Aside:
    """Writes one object a line to `file`."""

    file: TextIO
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def row(self, where: str, reason: str, value: str, line: bytes) -> None:
        """A row that can't be used, with its line (bytes that are no UTF-8 as \\xNN; the first MiB of a long one)."""
        text = line[:_MAX_LINE_BYTES].decode("utf-8", errors="backslashreplace")
        self._write(where, reason, {"where": where, "value": value}, {"line": text})

    def other(self, where: str, reason: str, **facts: object) -> None:
        """A rollout, group or pair that is left out; `where` is what the report names."""
        self._write(where, reason, {"where": where}, facts)

    def _write(self, where: str, reason: str, first: dict[str, Any], last: dict[str, Any]) -> None:
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append(f"{where}: {first['value']}" if "value" in first else where)
        known = REASONS[reason]
        record = {"reason": reason} | first | {"expected": known.expected, "fix": known.fix} | last
        # Escaped, so that half characters of a refused row can be written too
        self.file.write(json.dumps(record) + "\n")
