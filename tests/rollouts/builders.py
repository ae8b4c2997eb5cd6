"""Rows of rollouts files, as NeMo Gym writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megadpo.rollouts.store import Rollout


def message(text: str, role: str = "assistant") -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text, "annotations": []}]}


def reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": text}]}


def call(name: str, arguments: object, call_id: str = "call_1") -> dict[str, Any]:
    return {"type": "function_call", "name": name, "arguments": arguments, "call_id": call_id, "status": "completed"}


def call_output(output: object, call_id: str = "call_1") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output, "id": None, "status": None}


def current(
    prompt: object, output: object, reward: object, *, params: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A row of the current generation; a string as `output` becomes one message."""
    items = [message(output)] if isinstance(output, str) else output
    given = {"input": as_input(prompt), "tools": [], **(params or {})}
    return {"responses_create_params": given, "response": {"output": items, "status": None}, "reward": reward, **more}


def older(prompt: object, output: object, reward: object, **more: Any) -> dict[str, Any]:
    """A row of the older generation."""
    items = [message(output)] if isinstance(output, str) else output
    return {"responses_create_params": {"input": as_input(prompt)}, "output": items, "reward": reward, **more}


def as_input(prompt: object) -> object:
    return [{"role": "user", "content": prompt, "type": "message"}] if isinstance(prompt, str) else prompt


def write(path: Path, rows: Iterable[object]) -> Path:
    """A JSONL file; rows that are bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def rollout(reward: float, *, answer: int | None = None, chars: int = 10, line: int = 1, **more: Any) -> Rollout:
    """A record without a file behind it; by default each line has an answer of its own."""
    fields: dict[str, Any] = {
        "path": "rollouts.jsonl",
        "position": line - 1,
        "prompt": 0,
        "task": None,
        "rollout_index": None,
        "agent": "",
    }
    return Rollout(
        reward=reward, answer=line if answer is None else answer, answer_chars=chars, line=line, **fields | more
    )
