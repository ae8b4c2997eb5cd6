"""Rewards: a Python function, or `/verify` of a NeMo Gym resources server."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from megadpo.collect.client import JsonClient, RolloutFailure
from megadpo.collect.parameters import Body
from megadpo.config.problems import ConfigError, Problem

RewardFunction: TypeAlias = Callable[[Body], Any]
"""Gets the row with its `response`. Returns a number, or a mapping with `reward` and other fields for the row. It may be
async; else it runs in several threads."""
Score: TypeAlias = Callable[[Body], Awaitable[Body]]
"""Row -> fields to add to it; `reward` is a finite float. Raises RolloutFailure."""


def load_reward_function(name: str) -> RewardFunction:
    """Imports `module:function`, from the working directory or from installed packages. Raises ConfigError."""

    def refuse(expected: str, fix: str) -> ConfigError:
        return ConfigError(Problem("reward_function", name, expected, fix))

    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name.isidentifier() or "/" in name or module_name.endswith(".py"):
        raise refuse("module:function", "write it as rewards:score for the function score of rewards.py")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        fix = f"start the command in the module's folder, or set PYTHONPATH ({type(error).__name__}: {error})"
        raise refuse("a module that can be imported", fix) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [one for one, value in vars(module).items() if inspect.isfunction(value) and not one.startswith("_")]
        raise refuse(
            f"a function of {module_name}", f"choose one of {', '.join(names)}" if names else "write one there"
        )
    named: RewardFunction = function
    return named


def by_function(function: RewardFunction, parallel: int) -> Score:
    """Rewards by a Python function, in up to `parallel` threads. It gets a copy of the row, so it can't change the row."""
    # Not asyncio's threads: they are few, and the journal's fsync would wait for slow rewards
    threads = ThreadPoolExecutor(parallel, "reward")

    async def score(row: Body) -> Body:
        row = copy.deepcopy(row)
        try:
            if inspect.iscoroutinefunction(function):
                result = await function(row)
            else:
                result = await asyncio.get_running_loop().run_in_executor(threads, function, row)
            if inspect.isawaitable(result):
                result = await result
        except Exception as error:
            raise RolloutFailure("reward", f"reward_function raised {type(error).__name__}: {error}") from error
        return with_reward(result if isinstance(result, Mapping) else {"reward": result}, "reward_function")

    return score


def by_server(client: JsonClient) -> Score:
    """Rewards by a NeMo Gym resources server: POST /verify with the row. The fields of its answer are added to the row. A
    masked sample (`mask_sample`: the server's judge or sandbox failed) has no reward."""

    async def score(row: Body) -> Body:
        result = await client.post("verify", row)
        if result.get("mask_sample") is True:
            raise RolloutFailure("reward", f"/verify masked the sample: {result.get('failure_reason')}")
        return with_reward(result, "/verify")

    return score


def with_reward(result: Mapping[str, Any], source: str) -> Body:
    """The result with `reward` as a float. Raises RolloutFailure if it is missing or not finite, or if other fields can't
    be written as JSON."""
    reward = result.get("reward")
    try:
        # float() accepts scalars of NumPy and torch; it also accepts text, which is refused
        number = math.nan if isinstance(reward, (str, bytes)) else float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RolloutFailure("reward", f"{source} gave reward {str(reward)[:100]!r}; expected a finite number")
    found = {**result, "reward": number}
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RolloutFailure("reward", f"{source} gave fields that can't be written as JSON: {error}") from error
    return found


def answer_text(row: Mapping[str, Any]) -> str:
    """The text of the answer, without reasoning and tool calls. For reward functions."""
    parts = [
        part.get("text", "")
        for item in row["response"]["output"]
        if item.get("type") == "message" and item.get("role") == "assistant"
        for part in item["content"]
        if part.get("type") == "output_text"
    ]
    return "\n".join(parts)
