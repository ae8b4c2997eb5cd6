"""tools/compare_losses.py against a toy repository whose train.py writes the metrics that a revision stands for."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from tools.compare_losses import first_difference

TOOL = Path(__file__).resolve().parents[2] / "tools/compare_losses.py"
TOY_TRAIN = """
import json, sys, pathlib, megadpo
args = dict(a.split("=", 1) for a in sys.argv[2:])
assert args["checkpointing.enabled"] == "false"
logs = pathlib.Path(args["logger.log_dir"]); logs.mkdir(parents=True)
if "fail" in args: sys.exit(3)
rows = [{"step": s, "train/loss": 0.1 * s + (s == 2) * megadpo.OFF, "train/grad_norm": 1.0}
        for s in range(1, 1 + int(args["steps"]))]
(logs / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Revisions `first`, `same` (a comment more) and `other` (the loss of step 2 off by the last bit)."""
    folder = tmp_path / "repository"
    (folder / "launch").mkdir(parents=True)
    (folder / "megadpo").mkdir()
    (folder / "launch/train.py").write_text(TOY_TRAIN)
    git(tmp_path, "init", "--quiet", str(folder))
    for tag, code in {
        "first": "OFF = 0.0\n",
        "same": "# no change\nOFF = 0.0\n",
        "other": "OFF = 2.0**-55\n",
    }.items():
        (folder / "megadpo/__init__.py").write_text(code)
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", tag)
        git(folder, "tag", tag)
    return folder


def compare(repository: Path, a: str, b: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), a, b, "any.yaml", *overrides]
    return subprocess.run(command, cwd=repository, text=True, capture_output=True)


def test_revisions_with_the_same_losses(repository: Path):
    done = compare(repository, "first", "same", "steps=3")
    assert done.returncode == 0, done.stderr
    assert "the same bits in all 3 steps" in done.stdout
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, text=True, capture_output=True, check=True)
    assert len(worktrees.stdout.splitlines()) == 1


def test_one_bit_of_one_step_is_found_also_in_the_working_tree(repository: Path):
    done = compare(repository, "first", ".", "steps=3")  # the working tree is at `other`
    assert done.returncode == 1, done.stderr
    assert "step 2: train/loss 0.2 (0x1.999999999999ap-3) and 0.20000000000000004" in done.stdout


@pytest.mark.parametrize(
    ("revision", "overrides", "reason"),
    [
        ("same", ["fail=1", "steps=1"], "exit code"),
        ("nowhere", ["steps=1"], "nowhere"),
        ("same", ["steps=0"], "nothing"),
    ],
)
def test_nothing_to_compare_is_not_success(repository: Path, revision: str, overrides: list[str], reason: str):
    done = compare(repository, "first", revision, *overrides)
    assert done.returncode == 2
    assert reason in done.stderr


def test_first_difference():
    row = {"step": 1, "train/loss": 0.5, "train/grad_norm": 2.0}
    assert first_difference([row], [dict(row)]) is None
    assert first_difference([row, {**row, "step": 2}], [row]) == "one run ends after 1 steps, the other goes on to 2"
    assert "train/grad_norm" in str(first_difference([row], [{**row, "train/grad_norm": math.nextafter(2.0, 3.0)}]))
    assert "absent" in str(first_difference([row], [{"step": 1, "train/loss": 0.5}]))
    nan = {**row, "train/loss": math.nan}
    assert first_difference([nan], [dict(nan)]) is None
