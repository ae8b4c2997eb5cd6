"""The journal of finished rollouts. A killed process loses none of them.

`<output>.journal` has one JSON object on each line:

    {"megadpo_collect": {...}}     first line: input and options; a run with others is refused
    {... a rollout ...}            a finished rollout, as in the output file
    {"megadpo_answer": {...}}      the model has answered, but the reward failed; only the reward is computed again
    {"megadpo_finished": {...}}    all rollouts are in the output file; the journal then has only this and the first line

A line is written when its rollout is finished, so a killed process keeps it. It is on the disk (fsync) before the rollout
counts as done, so a power cut keeps it too. An incomplete last line is removed when the journal is opened.
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
from megadpo.collect.sampling import answer_digest
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
    """The place of a finished rollout in the journal, and what the summary needs of it."""

    offset: int
    length: int
    reward: float
    answer: bytes
    """Equal for equal answers (sampling.py)."""
    temperature: float | None
    """The temperature that was sent; None: none was."""

    @classmethod
    def of(cls, row: Body, offset: int, length: int) -> JournalEntry:
        """The entry of a finished rollout. Raises KeyError, TypeError, ValueError or AttributeError if the row is not one."""
        temperature = row.get("responses_create_params", {}).get("temperature")
        answer = answer_digest(row.get("response", {}).get("output"))
        return cls(offset, length, float(row["reward"]), answer, None if temperature is None else float(temperature))


class Journal:
    """The journal of one output file. It is locked against a second collector. Close it, or use it as a context manager.

    header: input and options of this run. restart: delete earlier rollouts. Raises ConfigError if the journal is in use
    or of a run with another header, DataError if a line before the last one is broken."""

    def __init__(self, path: Path, header: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.done: dict[Key, JournalEntry] = {}
        self.answers: dict[Key, Body] = {}
        """Responses that lack only their reward."""
        self.finished_rows: int | None = None
        """Number of rollouts in the output file, if an earlier run has finished it."""
        self._header = dict(header)
        self._written = self._synced = 0
        self._sync = asyncio.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._lock()
            if restart:
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
        """Closes and unlocks the file. A second call does nothing."""
        self._file.close()

    async def add(self, row: Body) -> None:
        """Writes a finished rollout. It is on the disk when this returns. Concurrent calls share one fsync."""
        self._add_line(to_line(row), row)
        mine = self._written
        async with self._sync:
            if self._synced < mine:
                target = self._written
                await asyncio.to_thread(os.fsync, self._file.fileno())
                self._synced = target

    def add_answer(self, key: Key, response: Body) -> None:
        """Writes an answer whose reward failed."""
        if key not in self.answers:
            self._append(to_line({_ANSWER: {TASK_INDEX: key[0], ROLLOUT_INDEX: key[1], "response": response}}))
            self.answers[key] = response

    def write_output(self, output: Path) -> int:
        """Writes the finished rollouts in order (aabbcc), all or nothing. Returns their number."""
        with write_then_rename(output) as partial, partial.open("wb") as file:
            for key in sorted(self.done):
                entry = self.done[key]
                file.write(os.pread(self._file.fileno(), entry.length, entry.offset))
        return len(self.done)

    def mark_finished(self) -> None:
        """Replaces the rollouts in the journal by a note that the output file has all of them."""
        rows = len(self.done)
        with write_then_rename(self.path) as partial:
            partial.write_bytes(to_line({_HEADER: self._header}) + to_line({_FINISHED: {"rows": rows}}))
        self.finished_rows = rows

    def _lock(self) -> None:
        """Locks the journal. The system releases the lock when the process ends in any way."""
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
                    raise self._not_a_journal()
                if not line.endswith(b"\n"):
                    raise ValueError("incomplete")
                record = json.loads(line)
                self._take(record, number, offset, len(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if offset + len(line) < os.fstat(self._file.fileno()).st_size:
                    fix = (
                        "delete this line, which another program wrote or changed; its rollout is then collected again"
                    )
                    where = f"{self.path}:{number}"
                    raise DataError(Problem(where, f"{line[:60]!r}", "a line of the journal", fix)) from error
                os.ftruncate(self._file.fileno(), offset)
                break
            offset += len(line)
        if offset == 0:
            self._append(to_line({_HEADER: self._header}))
            os.fsync(self._file.fileno())
            sync(self.path.parent)

    def _not_a_journal(self) -> DataError:
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
            self.done.setdefault(key, JournalEntry.of(record, offset, length))
            self.answers.pop(key, None)

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Raises ConfigError with every difference to the input and options of the run that started this journal."""
        now = json.loads(json.dumps(self._header))
        fix = (
            "use the earlier value, name another output_jsonl_fpath, or give resume_from_cache=false to delete the "
            f"rollouts in {self.path}"
        )
        problems = [
            Problem(name, now.get(name), f"{before.get(name)!r}, the value with which this output was started", fix)
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if problems:
            raise ConfigError(problems)

    def _add_line(self, line: bytes, row: Body) -> None:
        offset = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        self._append(line)
        key = (row[TASK_INDEX], row[ROLLOUT_INDEX])
        self.done[key] = JournalEntry.of(row, offset, len(line))
        self.answers.pop(key, None)

    def _append(self, line: bytes) -> None:
        start = os.lseek(self._file.fileno(), 0, os.SEEK_END)
        view = memoryview(line)
        try:
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError:
            with contextlib.suppress(OSError):  # after a full disk: remove the incomplete line
                os.ftruncate(self._file.fileno(), start)
            raise
        self._written += 1
