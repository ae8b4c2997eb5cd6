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
"""Gets the row with its `response`; gives a number, or a mapping with `reward` and what else belongs in the row; may be
async. Other functions run in threads, several at once."""
Score: TypeAlias = Callable[[Body], Awaitable[Body]]
"""Row -> what the reward adds to it, `reward` (a finite float) among it. Raises RolloutFailure."""


def load_reward_function(name: str) -> RewardFunction:
    """`module:function`, from the folder where the command was started or from what is installed. Raises ConfigError."""

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
        fix = f"start the command in the folder that holds it, or set PYTHONPATH ({type(error).__name__}: {error})"
        raise refuse("a module that can be imported", fix) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = [one for one, value in vars(module).items() if inspect.isfunction(value) and not one.startswith("_")]
        raise refuse(f"a function of {module_name}", f"choose one of {', '.join(there) or 'those you write there'}")
    named: RewardFunction = function
    return named


def by_function(function: RewardFunction, parallel: int) -> Score:
    """Rewards of a Python function, up to `parallel` at once. It gets a copy of the row: it can't change what is
    written."""
    # Its own threads: asyncio's are few, and the journal's fsync would wait behind slow rewards.
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
    """Rewards of a NeMo Gym resources server: POST /verify with the row. What it answers joins the row. A sample that
    it masks (`mask_sample`: its judge or sandbox failed, not the model) has no reward."""

    async def score(row: Body) -> Body:
        result = await client.post("verify", row)
        if result.get("mask_sample") is True:
            raise RolloutFailure("reward", f"/verify masked the sample: {result.get('failure_reason')}")
        return with_reward(result, "/verify")

    return score


def with_reward(result: Mapping[str, Any], source: str) -> Body:
    """The result with `reward` as a float. Raises RolloutFailure where that is missing or not finite, or where the rest
    can't be written as JSON."""
    reward = result.get("reward")
    try:
        # NumPy's and torch's scalars have float(); text has it too, but is a mistake.
        number = math.nan if isinstance(reward, (str, bytes)) else float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RolloutFailure("reward", f"{source} gave reward {str(reward)[:100]!r}; expected a finite number")
    found = {**result, "reward": number}
    try:
        json.dumps(found, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RolloutFailure("reward", f"{source} gave fields that are no JSON: {error}") from error
    return found


def answer_text(row: Mapping[str, Any]) -> str:
    """The text that the model answered, without reasoning and tool calls; for reward functions."""
    parts = [
        part.get("text", "")
        for item in row["response"]["output"]
        if item.get("type") == "message" and item.get("role") == "assistant"
        for part in item["content"]
        if part.get("type") == "output_text"
    ]
    return "\n".join(parts)
