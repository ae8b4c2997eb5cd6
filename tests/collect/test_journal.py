"""The journal by itself: torn and broken lines, order, and what is on the disk when a row counts as done."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.collect.journal import Journal
from megadpo.config.problems import ConfigError, DataError
from tests.collect.runs import read

HEADER = {"num_repeats": 2}
KEYS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def row(key: tuple[int, int]) -> dict:
    return {"_ng_task_index": key[0], "_ng_rollout_index": key[1], "reward": 0.5, "text": "é\u2028x"}


def add(journal: Journal, *keys: tuple[int, int]) -> None:
    async def all_at_once() -> None:
        await asyncio.gather(*(journal.add(row(key)) for key in keys))

    asyncio.run(all_at_once())


@given(order=st.permutations(KEYS), cut_bytes=st.integers(0, 600))
def test_whatever_byte_a_kill_leaves_off_whole_lines_stay(tmp_path_factory, order, cut_bytes):
    folder: Path = tmp_path_factory.mktemp("journal")
    path, output = folder / "out.jsonl.journal", folder / "out.jsonl"
    with Journal(path, HEADER) as journal:
        add(journal, *order)
        ends = [entry.offset + entry.length for entry in journal.done.values()]
    size = max(0, max(ends) - cut_bytes)
    os.truncate(path, size)
    with Journal(path, HEADER) as journal:
        assert len(journal.done) == sum(end <= size for end in ends)
        add(journal, *(key for key in KEYS if key not in journal.done))
        assert journal.write_output(output) == 4
    assert [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]] == [row(key) for key in KEYS]


def test_a_row_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    synced: list[int] = []
    with Journal(path, HEADER) as journal:
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
        add(journal, *KEYS)
    assert synced and synced[-1] == path.stat().st_size
    assert len(synced) < len(KEYS)  # those that wait share one


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        add(journal, *KEYS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:20] + b"\n", *lines[3:]]))
    with pytest.raises(DataError, match="journal:3"):
        Journal(path, HEADER)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with Journal(path, HEADER) as journal:
        assert len(journal.done) == 3


def test_other_options_and_other_users_are_refused(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        add(journal, (0, 0))
        with pytest.raises(ConfigError, match="in use"):
            Journal(path, HEADER)
    with pytest.raises(ConfigError, match="num_repeats: got 3; expected 2.*resume_from_cache=false"):
        Journal(path, {"num_repeats": 3})
    with Journal(path, {"num_repeats": 3}, restart=True) as journal:
        assert not journal.done


def test_an_answer_waits_for_its_reward(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        journal.add_answer((0, 1), {"output": []})
    with Journal(path, HEADER) as journal:
        assert journal.answers == {(0, 1): {"output": []}} and not journal.done
        add(journal, (0, 1))
    with Journal(path, HEADER) as journal:
        assert not journal.answers and set(journal.done) == {(0, 1)}


def test_a_finished_journal_says_only_that(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        add(journal, *KEYS)
        journal.mark_finished()
    assert len(read(path)) == 2
    with Journal(path, HEADER) as journal:
        assert journal.finished_rows == 4


def test_a_full_disk_leaves_no_half_line(tmp_path):
    path = tmp_path / "journal"
    with Journal(path, HEADER) as journal:
        add(journal, (0, 0))
        size = path.stat().st_size
        whole = journal._file

        class Full:
            def __getattr__(self, name: str) -> object:
                return getattr(whole, name)

            def write(self, data: bytes) -> int:
                if len(data) < 40:
                    raise OSError(28, "No space left on device")
                return whole.write(data[:30])

        journal._file = Full()
        with pytest.raises(OSError, match="No space left"):
            add(journal, (0, 1))
        journal._file = whole
    assert path.stat().st_size == size
