"""Checks and reads `responses_create_params`, a row's parameters of the request.

The fields are those of OpenAI's Responses API (https://platform.openai.com/docs/api-reference/responses). Fields that only
some servers have (`seed`, `top_k`, `chat_template_kwargs`) are JSON text in `metadata.extra_body`, as in NeMo Gym. They are
sent at the top level of the request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from megadpo.config.problems import Problem
from megadpo.config.reader import nearest_name

Params: TypeAlias = Mapping[str, Any]
Body: TypeAlias = dict[str, Any]

# Other values than these would not give one whole answer to this input
_ONLY = {"stream": (False, None), "background": (False, None), "model": (None,), "previous_response_id": (None,)}
_NUMBERS = {"temperature": (0.0, math.inf), "top_p": (0.0, 1.0)}
# fmt: off
_FIELDS = [
    "background", "conversation", "include", "input", "instructions", "max_output_tokens", "max_tool_calls",
    "metadata", "model", "parallel_tool_calls", "previous_response_id", "prompt", "prompt_cache_key",
    "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "stream",
    "stream_options", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user",
]
# fmt: on
_FIXES = {
    "stream": "leave it out: the collector needs whole answers",
    "background": "leave it out: each request waits for its answer",
    "model": "leave it out (or give responses_create_params.model=null): policy_model_name is the model",
    "previous_response_id": "give the earlier turns in input",
}


@dataclass(frozen=True)
class Findings:
    """Collects the problems of one row's parameters."""

    where: str
    """`file:line`."""
    problems: list[Problem]

    def add(self, name: str, value: object, expected: str, fix: str) -> None:
        """Adds a problem of `responses_create_params.<name>`."""
        self.problems.append(Problem(f"{self.where}: responses_create_params.{name}", value, expected, fix))


def check_params(params: Params, findings: Findings) -> None:
    """Reports what is wrong for both endpoints: unknown names, wrong types, streaming, no input."""
    for name, value in params.items():
        if name not in _FIELDS:
            near = nearest_name(name, _FIELDS, frozenset())
            fix = "write fields that only your server has into metadata.extra_body, as JSON"
            fix = f"did you mean {near}? Otherwise " + fix if near in _FIELDS else fix
            findings.add(name, value, "a field of the Responses API", fix)
        elif name in _ONLY and value not in _ONLY[name]:
            findings.add(name, value, "null", _FIXES[name])
    for name, (low, high) in _NUMBERS.items():
        value = params.get(name)
        if value is not None and not (_is_number(value) and low <= value <= high):
            bounds = f"a number from {low:g}" + (f" to {high:g}" if math.isfinite(high) else " up")
            findings.add(name, value, bounds, "correct the number")
    tokens = params.get("max_output_tokens")
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        findings.add("max_output_tokens", tokens, "a whole number >= 1", "correct the number")
    if not isinstance(params.get("input"), (str, list)) or not params["input"]:
        fix = "give the prompt as text or as a list of messages"
        findings.add("input", params.get("input"), "text or a list of messages, not empty", fix)
    _extra_body(params, findings)


def extra_body(params: Params) -> Body:
    """`metadata.extra_body` as a mapping; empty if there is none. The parameters must have been checked."""
    return _extra_body(params, Findings("", []))


def with_seed(params: Params, seed: int) -> Body:
    """The parameters with `seed` in `metadata.extra_body`, as NeMo Gym's num_repeats_add_seed writes them."""
    metadata = dict(params.get("metadata") or {})
    metadata["extra_body"] = json.dumps(extra_body(params) | {"seed": seed})
    return {**params, "metadata": metadata}


def text_extra_body(params: Params) -> Body:
    """The parameters with `metadata.extra_body` as text, as in NeMo Gym. (The command line gives it as a mapping.)"""
    metadata = params.get("metadata")
    if isinstance(metadata, Mapping) and isinstance(metadata.get("extra_body"), Mapping):
        return {**params, "metadata": {**metadata, "extra_body": json.dumps(metadata["extra_body"])}}
    return dict(params)


def _extra_body(params: Params, findings: Findings) -> Body:
    metadata = params.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        findings.add("metadata", metadata, "a mapping", 'write metadata: {"extra_body": "..."}')
        return {}
    text = metadata.get("extra_body", "{}")
    try:
        extra = json.loads(text)
    except (TypeError, ValueError):
        extra = None
    if not isinstance(extra, dict):
        findings.add("metadata.extra_body", text, "a JSON object as text", """write it as '{"top_k": 20}'""")
        return {}
    clashes = sorted({"model", "input", "messages", "stream", "n"} & extra.keys())
    if clashes:
        findings.add("metadata.extra_body", text, f"no {', '.join(clashes)}", "remove it: the collector sets it")
    return extra


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
