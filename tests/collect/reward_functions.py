"""Reward functions that tests name as module:function."""

from __future__ import annotations

import json
from typing import Any

from megadpo.collect.rewards import answer_text


def seed_of(row: dict[str, Any]) -> int:
    seed = json.loads(row["responses_create_params"]["metadata"]["extra_body"])["seed"]
    assert isinstance(seed, int)
    return seed


def by_seed(row: dict[str, Any]) -> float:
    assert answer_text(row).endswith(str(seed_of(row)))
    return seed_of(row) / 4


async def later(row: dict[str, Any]) -> dict[str, Any]:
    row["response"] = "a function may change its copy"
    return {"reward": 1, "length": len(row)}


def never_for_seed_1(row: dict[str, Any]) -> float:
    return float("nan") if seed_of(row) == 1 else 1.0


def broken(row: dict[str, Any]) -> float:
    raise ZeroDivisionError("no such answer")


def by_length(row: dict[str, Any]) -> float:
    return float(len(answer_text(row)))
