"""Stores rollouts: a small record of each in memory; each different prompt and answer once on disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from megadpo.messages.chat import ChatMessage
from megadpo.rollouts.left_out import Unusable
from megadpo.rollouts.row import TaskIndex


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer to one prompt."""

    path: str
    line: int
    """From 1."""
    position: int
    """Row of the file, from 0. Unusable rows count; blank lines don't."""
    reward: float
    prompt: int
    """Number of prompt and tools in the store. Equal prompts have the same number."""
    answer: int
    """Number of the answer in the store. Answers that differ only in ids of tool calls have the same number."""
    answer_chars: int
    task: TaskIndex | None
    rollout_index: int | None
    agent: str

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


class TextStore:
    """JSON values in a file without a name. The system deletes it when the process ends in any way.

    Each prompt is written once for all its rollouts. 100,000 rollouts need about 50 MB of memory."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._places: list[tuple[int, int]] = []
        self._end = 0
        self._numbers: dict[bytes, int] = {}

    def __enter__(self) -> TextStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add_prompt(self, messages: list[ChatMessage], tools: list[dict[str, Any]]) -> int:
        """Number of the prompt. Raises Unusable for text that UTF-8 can't encode."""
        data = _encoded({"prompt": messages} | ({"tools": tools} if tools else {}), "input")
        return self._add(b"input:", data, data)

    def add_answer(self, messages: list[ChatMessage]) -> int:
        """Number of the answer. Raises Unusable for text that UTF-8 can't encode."""
        data = _encoded(messages, "output")
        bare = _without_ids(messages)
        return self._add(b"output:", data, data if bare == messages else _encoded(bare, "output"))

    def get(self, number: int) -> Any:
        """The stored value: {prompt, tools?} of a prompt, messages of an answer."""
        start, size = self._places[number]
        self._file.seek(start)
        return json.loads(self._file.read(size))

    def _add(self, kind: bytes, data: bytes, identity: bytes) -> int:
        digest = hashlib.blake2b(kind + identity, digest_size=16).digest()
        number = self._numbers.setdefault(digest, len(self._places))
        if number == len(self._places):
            self._places.append((self._end, len(data)))
            self._file.seek(self._end)
            self._file.write(data)
            self._end += len(data)
        return number


def _encoded(value: object, name: str) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.start + 1]
        raise Unusable("half_character", f"{name} with half a surrogate pair, {half!a}") from error


def _without_ids(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The messages without the ids of tool calls, which are random."""
    bare = []
    for message in messages:
        message = {key: value for key, value in message.items() if key != "tool_call_id"}
        if "tool_calls" in message:
            message["tool_calls"] = [
                {key: value for key, value in call.items() if key != "id"} for call in message["tool_calls"]
            ]
        bare.append(message)
    return bare
