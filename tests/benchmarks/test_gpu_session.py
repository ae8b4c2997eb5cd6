"""The GPU session's order of events: results as they come, parts that fail or run out of time, and going on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_code, gpu_head, gpu_kernels, gpu_tests

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = """
import time
import pytest

@pytest.mark.gpu
def test_a():
    print("1e-3 off")

@pytest.mark.gpu
def test_ab():
    assert not {fails}

@pytest.mark.gpu
@pytest.mark.xdist_group("shared")
def test_c():
    time.sleep({sleeps})

@pytest.mark.gpu
@pytest.mark.xdist_group("shared")
def test_d():
    pass

def test_on_any_machine():
    pass
"""


def run_tests(folder, *, fails=False, sleeps=0, enough=None, code="a"):
    """enough: the time is up as soon as this many tests have ended."""
    (folder / "test_some.py").write_text(TESTS.format(fails=fails, sleeps=sleeps))
    limit_s, passed_s, save = 60.0, 0.0, gpu_tests.save

    def saved(path, content):
        nonlocal passed_s
        if len(content["tests"]) == enough:
            passed_s = limit_s + 1
        save(path, content)

    clock = SimpleNamespace(monotonic=lambda: passed_s, sleep=lambda seconds: time.sleep(seconds / 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_tests, "save", saved)
        patch.setattr(gpu_tests, "time", clock)
        paths = [str(folder / "test_some.py")]
        content = gpu_tests.run(paths, folder / "tests.json", {"code": code}, limit_s, workers=3)
    assert json.loads((folder / "tests.json").read_text()) == content
    return {one["id"].split("::")[1]: one for one in content["tests"]}, [
        name.split("::")[1] for name in content["left"]
    ]


@pytest.mark.slow
def test_gpu_tests_write_what_they_have_when_time_is_up_and_go_on(tmp_path, capfd):
    found, left = run_tests(tmp_path, fails=True, sleeps=100, enough=2)
    assert {name: one["outcome"] for name, one in found.items()} == {"test_a": "passed", "test_ab": "failed"}
    assert "1e-3 off" in found["test_a"]["said"] and "assert not True" in found["test_ab"]["failed"]
    assert left == ["test_c", "test_d"]  # they share a group, so one process ran them in order
    assert "1 failed, 1 passed" in capfd.readouterr().out  # interrupted, so pytest says what it has
    found, left = run_tests(tmp_path)
    assert {name: one["outcome"] for name, one in found.items()} == dict.fromkeys(
        ("test_a", "test_ab", "test_c", "test_d"), "passed"
    )
    assert left == [] and "3 passed" in capfd.readouterr().out  # test_a is not run again
    run_tests(tmp_path, code="b")
    assert "4 passed" in capfd.readouterr().out


PYTHON = """#!/bin/bash
echo "$*" >>{log}
case "$*" in
  *import*) exit 1 ;;
  *gpu_code.py) echo "$CODE" ;;
  *gpu_kernels.py*) sleep "$KERNELS_S" ;;
  *broken.whl | *gpu_te.py*) exit 1 ;;
  *gpu_head.py*) exit 3 ;;
  *gpu_machine*) echo '{{"gpu": "none"}}' ;;
esac
"""


@pytest.fixture
def session(tmp_path):
    """gpu_session.sh with an interpreter that notes what it was asked."""
    python, log = tmp_path / "python", tmp_path / "asked"
    python.write_text(PYTHON.format(log=log))
    python.chmod(0o755)

    def call(*arguments, limit_s=450, code="a", out="out", killed_in=None):
        """What came of the session, and what it asked for. killed_in: the script that it is killed in."""
        log.write_text("")
        environment = {**os.environ, "PYTHON": str(python), "LIMIT_S": str(limit_s), "CODE": code, "KERNELS_S": "0"}
        command = ["bash", str(REPOSITORY / "benchmarks" / "gpu_session.sh"), "--out", str(tmp_path / out), *arguments]
        if killed_in is None:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        else:
            environment["KERNELS_S"] = "5"
            done = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while killed_in not in log.read_text() and done.poll() is None:
                time.sleep(0.02)
            done.kill()
            done.wait()
        scripts = ("gpu_machine", "gpu_te.py", "gpu_kernels.py", "gpu_head", "gpu_tests", "four.json", "8b.json")
        asked = [next((name for name in scripts if name in line), None) for line in log.read_text().splitlines()]
        return done, [name for name in asked if name]

    return call


def test_the_first_hour_runs_every_part_and_goes_on_where_it_stopped(session, tmp_path):
    done, asked = session("first")
    assert asked == ["gpu_machine", "gpu_te.py", "gpu_kernels.py", "gpu_head", "four.json", "gpu_tests"], done.stderr
    assert done.returncode == 1 and "te FAILED with code 1" in done.stdout
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == {"gpu": "none"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "session.jsonl").read_text().splitlines()]
    assert [(one["part"], one["rc"]) for one in lines] == [
        ("check", 0), ("te", 1), ("kernels", 0), ("head", 3), ("four", 0), ("test", 0)
    ]  # fmt: skip
    following = done.stdout.split("== next")[1].splitlines()[1:]
    assert [line.split()[-1] for line in following] == [
        "te",
        "head",
        "trl8b",
        "8b",
        "alike",
        "ours8b",
        "trl",
        "1b",
        "fp8",
        "8b128",
        "ours",
    ]
    assert session("first")[1] == ["gpu_te.py", "gpu_head"]
    assert "gpu_machine" in session("first", "--again")[1]
    assert session("check", code="b")[1] == ["gpu_machine"], "another code has not run yet"


def files_of(archive):
    with tarfile.open(archive) as opened:
        return {name.removeprefix("./") for name in opened.getnames()} - {"."}


def test_a_session_goes_on_from_the_archive_of_the_one_before(session, tmp_path):
    archive = tmp_path / "r.tgz"
    _, asked = session("--pack", str(archive), "first", killed_in="gpu_kernels.py")
    assert asked == ["gpu_machine", "gpu_te.py", "gpu_kernels.py"]
    assert files_of(archive) == {"session.jsonl", "check.json", "check.log", "te.log"}
    done, asked = session("--from", str(archive), "--pack", str(archive), "first", out="other")
    assert asked == ["gpu_te.py", "gpu_kernels.py", "gpu_head", "four.json", "gpu_tests"], done.stderr
    assert files_of(archive) == {one.name for one in (tmp_path / "other").iterdir()} and "four.log" in files_of(archive)
    assert list(tmp_path.glob("*.part")) == []
    done, asked = session("--from", str(tmp_path / "none.tgz"), "check", out="third")
    assert (done.returncode, asked) == (2, [])


def test_a_session_does_not_start_without_its_wheels(session, tmp_path):
    (tmp_path / "wheels").mkdir()
    done, asked = session("--wheels", str(tmp_path / "wheels"), "check")
    assert (done.returncode, asked) == (2, []) and "nothing there" in done.stderr
    (tmp_path / "wheels" / "broken.whl").touch()
    done, asked = session("--wheels", str(tmp_path / "wheels"), "check")
    assert (done.returncode, asked) == (2, []) and "could not be installed" in done.stderr


def test_code_has_a_digest_that_every_change_changes(tmp_path):
    files = ("megadpo/a.py", "megadpo/b/c.py", "benchmarks/d.sh", "tests/e/f.py")
    for name in (*files, "docs/g.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    seen = [gpu_code.digest(tmp_path)]
    for name in files:
        (tmp_path / name).write_text("y")
        seen.append(gpu_code.digest(tmp_path))
    (tmp_path / "megadpo" / "a.py").rename(tmp_path / "megadpo" / "z.py")
    seen.append(gpu_code.digest(tmp_path))
    assert len(set(seen)) == len(seen)
    (tmp_path / "docs" / "g.md").write_text("y")
    assert gpu_code.digest(tmp_path) == seen[-1]


def test_a_copy_without_git_has_the_commit_that_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_code, "REPOSITORY", tmp_path)
    assert gpu_code.commit() == "unknown"
    monkeypatch.setenv("MEGADPO_COMMIT", "abc")
    assert gpu_code.commit() == "abc"


def test_no_part_is_started_that_has_no_time(session):
    done, asked = session("8b", limit_s=10)
    assert asked == [] and "8b: not started" in done.stdout and done.stdout.rstrip().endswith("ours")


def test_the_head_goes_on_with_the_sizes_that_are_missing(tmp_path, capsys):
    out = tmp_path / "head.json"
    assert gpu_head.main(["--smoke", "--minutes", "-1", "--out", str(out)]) == 3
    assert gpu_head.main(["--smoke", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    content["results"][0]["answer_tokens"] = 64
    content["results"][0]["mark"] = "measured before"
    out.write_text(json.dumps(content))
    assert gpu_head.main(["--smoke", "--out", str(out)]) == 0
    capsys.readouterr()
    assert [one["mark"] for one in json.loads(out.read_text() or "{}")["results"]] == ["measured before"]


def test_the_table_of_kernels_has_who_ran_and_why_the_others_did_not(tmp_path, capsys):
    out = tmp_path / "kernels.json"
    assert gpu_kernels.main(["--smoke", "--minutes", "-1", "--out", str(out)]) == 3
    assert gpu_kernels.main(["--smoke", "--out", str(out)]) == 0
    lines = json.loads(out.read_text())["lines"]
    ran = [name for name, line in lines.items() if "both_ms" in line]
    assert [name.split(", ")[-1] for name in ran] == ["sdpa", "passes"] and len(lines) == 1 + 3 + 2 + 3
    assert all("not_run" in line for name, line in lines.items() if name not in ran)
    said = capsys.readouterr().out
    assert "flash3 | | not run" in said and "adam, triton | | not run: needs a GPU" in said


def test_every_script_says_what_it_wants_without_a_gpu():
    for script in ("gpu_te.py", "gpu_tests.py", "gpu_kernels.py"):
        command = [sys.executable, str(REPOSITORY / "benchmarks" / script), "--help"]
        assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
