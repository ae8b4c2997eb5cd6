"""Questions and worked answers: sums of two two-digit numbers, column by column.

The model is first trained on answers of a pupil who forgets to carry in most sums that need it (17 + 25 = 32), so it
learns this mistake. The preference pairs then have the right answer as chosen and the mistake as rejected.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

FORGETS_TO_CARRY = 0.7
"""Share of the sums with a carry in which the pupil forgets it."""

Sum = tuple[int, int]


def question(a: int, b: int) -> str:
    return f"What is {a}+{b}?\n"


def worked_answer(a: int, b: int, *, slip: bool = False) -> str:
    """The sum in columns; the last number is the result. With a slip the carry is forgotten, or invented."""
    units = a % 10 + b % 10
    carry = int(units >= 10) ^ int(slip)
    tens = a // 10 + b // 10 + carry
    return (
        f"{a % 10}+{b % 10}={units}, carry {carry}. "
        f"{a // 10}+{b // 10}+{carry}={tens}. Answer: {10 * tens + units % 10}"
    )


def pupils_answer(a: int, b: int, rng: random.Random) -> str:
    """The right answer, except for carries that the pupil forgets."""
    needs_carry = a % 10 + b % 10 >= 10
    return worked_answer(a, b, slip=needs_carry and rng.random() < FORGETS_TO_CARRY)


def is_right(a: int, b: int, answer: str) -> bool:
    """Whether the last number of the answer is the sum."""
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and int(numbers[-1]) == a + b


def split_sums(*, held_out: int, seed: int) -> tuple[list[Sum], list[Sum]]:
    """(training, held out), shuffled. 17 + 25 and 25 + 17 are the same sum, so they are in the same list."""
    sums = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng = random.Random(seed)
    rng.shuffle(sums)
    chosen = [pair if rng.random() < 0.5 else pair[::-1] for pair in sums[:held_out]]
    training = [order for a, b in sums[held_out:] for order in {(a, b), (b, a)}]
    rng.shuffle(training)
    return training, chosen


def write_warm_up(path: Path, sums: Iterable[Sum], *, seed: int) -> None:
    """Pairs for supervised training: chosen is the pupil's answer. That loss doesn't use rejected."""
    rng = random.Random(seed)
    rows = [{"prompt": question(a, b), "chosen": pupils_answer(a, b, rng), "rejected": "?"} for a, b in sums]
    _write_jsonl(path, rows)


def write_preferences(path: Path, sums: Iterable[Sum]) -> None:
    """Pairs for DPO: chosen is right, rejected has the slip."""
    rows = [
        {"prompt": question(a, b), "chosen": worked_answer(a, b), "rejected": worked_answer(a, b, slip=True)}
        for a, b in sums
    ]
    _write_jsonl(path, rows)


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
