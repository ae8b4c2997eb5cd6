"""Whole or absent: what a reader finds at any moment, and what reaches the disk in which order."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadpo.files.atomic import delete_left_over, in_use, write_then_rename


def test_a_reader_sees_the_old_content_until_all_is_written(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with write_then_rename(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old" and partial.parent == tmp_path
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_written_in_the_same_way(tmp_path: Path) -> None:
    with write_then_rename(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").touch()
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["a"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_error_or_a_signal_leaves_nothing_behind(tmp_path: Path, is_folder: bool) -> None:
    (tmp_path / "a").write_text("old")

    def write_half() -> None:
        with write_then_rename(tmp_path / "a") as partial:
            partial.mkdir() if is_folder else partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_block_that_writes_nothing_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with write_then_rename(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with write_then_rename(target) as one:
        one.write_text("one")
        with write_then_rename(target) as two:
            two.write_text("two")
        assert target.read_text() == "two"
    assert target.read_text() == "one" and os.listdir(tmp_path) == ["a"]


WRITER = """
import sys, time
from pathlib import Path
from megadpo.files.atomic import in_use, write_then_rename
with write_then_rename(Path(sys.argv[1])) as partial:
    partial.mkdir()
    with in_use(partial):
        (partial / "half").touch()
        print("writing", flush=True)
        time.sleep(60)
"""


def test_what_a_killed_writer_left_is_deleted_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    target = tmp_path / "export[1]"
    others = [tmp_path / f".{name}.0123456789ab.partial" for name in ("export1", "export[1].old", "other")]
    for folder in others:
        folder.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    (left,) = delete_left_over(target)
    assert (left / "half").exists()
    writer.kill()
    writer.wait()
    assert left.exists() and delete_left_over(target) == []
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_file_system_without_locks_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = tmp_path / ".a.0123456789ab.partial"
    left.mkdir()
    with in_use(left):
        assert delete_left_over(tmp_path / "a") == [left] and left.exists()


@pytest.mark.parametrize(("durable", "order"), [(True, ["fsync a", "rename", "fsync folder"]), (False, ["rename"])])
def test_the_content_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, order: list[str]
) -> None:
    seen: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        is_folder = os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        seen.append("fsync folder" if is_folder else "fsync a")
        fsync(descriptor)

    def noted_replace(*paths: Path) -> None:
        seen.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with write_then_rename(tmp_path / "a", durable=durable) as partial:
        partial.write_text("x")
    assert seen == order
