"""What is finished, kept so that a kill at any moment loses none of it.

`<output>.journal` holds one JSON object a line:

    {"megadpo_collect": {...}}     first: input and options; a run with others is refused
    {... a rollout ...}            finished: as the output file will hold it
    {"megadpo_answer": {...}}      the model has answered, but the reward failed: only the reward is asked for again
    {"megadpo_finished": {...}}    all are there, in the output file; the journal then holds nothing else

A line is written whole as soon as its rollout is finished, which a killed process survives, and is on the disk (fsync)
before the rollout counts as done, which a power cut survives. A torn last line is cut off when the journal is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from megadpo.collect.parameters import Body
from megadpo.collect.tasks import ROLLOUT_INDEX, TASK_INDEX
from megadpo.config.problems import ConfigError, DataError, Problem
from megadpo.files.atomic import sync, write_then_rename
from megadpo.files.jsonl import to_line

Key: TypeAlias = tuple[int, int]
"""(task index, rollout index)."""

_HEADER, _ANSWER, _FINISHED = "megadpo_collect", "megadpo_answer", "megadpo_finished"
_START = b'{"' + _HEADER.encode() + b'": '
_READ_BYTES = 1 << 20


class JournalEntry(NamedTuple):
    """Where a finished rollout is in the journal."""

    offset: int
    length: int
    reward: float


class Journal:
    """The journal of one output file, locked against a second collector. Close it, or use it as a context manager.

    header: input and options of this run. Raises ConfigError where the journal is another run's or in use, DataError
    where a line in its middle is broken."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, start_anew: bool = False) -> None:
        self.path = path
        self.done: dict[Key, JournalEntry] = {}
        self.answers: dict[Key, Body] = {}
        """Responses that lack only their reward."""
        self.finished_rows: int | None = None
        """Rollouts in the output file, where an earlier run has finished it."""
        self._header = dict(header)
        self._written = self._synced = 0
        self._sync = asyncio.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._lock()
            if start_anew:
                self._file.truncate(0)
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back. A second call does nothing."""
        self._file.close()

    async def add(self, row: Body) -> None:
        """Keep a finished rollout: written at once, on the disk when this returns. Those that wait share one fsync."""
        self._add_line(to_line(row), row)
        mine = self._written
        async with self._sync:
            if self._synced < mine:
                target = self._written
                await asyncio.to_thread(os.fsync, self._file.fileno())
                self._synced = target

    def add_answer(self, key: Key, response: Body) -> None:
        """Keep an answer whose reward failed."""
        if key not in self.answers:
            self._append(to_line({_ANSWER: {TASK_INDEX: key[0], ROLLOUT_INDEX: key[1], "response": response}}))
            self.answers[key] = response

    def write_output(self, output: Path) -> int:
        """Write the finished rollouts in order (aabbcc), the whole file or nothing of it; returns their number."""
        with write_then_rename(output) as partial, partial.open("wb") as file:
            for key in sorted(self.done):
                entry = self.done[key]
                file.write(os.pread(self._file.fileno(), entry.length, entry.offset))
        return len(self.done)

    def mark_finished(self) -> None:
        """The output file has every rollout: keep only that."""
        rows = len(self.done)
        with write_then_rename(self.path) as partial:
            partial.write_bytes(to_line({_HEADER: self._header}) + to_line({_FINISHED: {"rows": rows}}))
        self.finished_rows = rows

    def _lock(self) -> None:
        """One collector at a time. The system gives the lock back when its process ends, however it ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except BlockingIOError:
            held = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                raise
            held = True
        if not held:
            fix = "wait for the other collector to end, or name another output_jsonl_fpath"
            raise ConfigError(Problem(str(self.path), "in use", "no other collector with this output", fix))

    def _load(self) -> None:
        self._file.seek(0)
        offset = 0
        for number, line in enumerate(open(self._file.fileno(), "rb", _READ_BYTES, closefd=False), start=1):  # noqa: SIM115
            try:
                if number == 1 and not _START.startswith(line[: len(_START)]):
                    raise self._foreign()
                if not line.endswith(b"\n"):
                    raise ValueError("torn")
                record = json.loads(line)
                self._take(record, number, offset, len(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if offset + len(line) < os.fstat(self._file.fileno()).st_size:
                    fix = "delete this line (its rollout is then asked for again); something else wrote to the journal"
                    where = f"{self.path}:{number}"
                    raise DataError(Problem(where, f"{line[:60]!r}", "a line of the journal", fix)) from error
                os.ftruncate(self._file.fileno(), offset)
                break
            offset += len(line)
        if offset == 0:
            self._append(to_line({_HEADER: self._header}))
            os.fsync(self._file.fileno())
            sync(self.path.parent)

    def _foreign(self) -> DataError:
        fix = "move that file away, or name another output_jsonl_fpath"
        return DataError(Problem(f"{self.path}:1", "another kind of file", "a journal of collect_rollouts", fix))

    def _take(self, record: Body, number: int, offset: int, length: int) -> None:
        if number == 1:
            self._compare(record[_HEADER])
        elif _FINISHED in record:
            self.finished_rows = record[_FINISHED]["rows"]
        elif _ANSWER in record:
            answer = record[_ANSWER]
            self.answers[answer[TASK_INDEX], answer[ROLLOUT_INDEX]] = answer["response"]
        else:
            key = (record[TASK_INDEX], record[ROLLOUT_INDEX])
            self.done.setdefault(key, JournalEntry(offset, length, float(record["reward"])))
            self.answers.pop(key, None)

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Refuse to go on with what another input or other options began; every difference is named."""
        now = json.loads(json.dumps(self._header))
        fix = (
            "go on with it as it was, name another output_jsonl_fpath, or give resume_from_cache=false to discard what "
            f"{self.path} holds"
        )
        problems = [
            Problem(name, now.get(name), f"{before.get(name)!r}, with which this output was begun", fix)
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if problems:
            raise ConfigError(problems)

    def _add_line(self, line: bytes, row: Body) -> None:
        offset = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        self._append(line)
        key = (row[TASK_INDEX], row[ROLLOUT_INDEX])
        self.done[key] = JournalEntry(offset, len(line), row["reward"])
        self.answers.pop(key, None)

    def _append(self, line: bytes) -> None:
        start = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        view = memoryview(line)
        try:
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):  # a full disk: leave no half line before what comes later
                os.ftruncate(self._file.fileno(), start)
            raise
        self._written += 1
