"""`megadpo pairs` as a user starts it: exit codes, the printed report, refusals, --report."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megadpo.commands import main
from tests.rollouts.builders import current, write


def rollouts(folder: Path, name: str = "rollouts.jsonl") -> Path:
    rows = [
        current(f"q{n}", f"a{k}" * (k + 1), reward) for n in range(4) for k, reward in enumerate([0, 0.05, 0.5, 0.9])
    ]
    return write(folder / name, [*rows, {"reward": None}, current("alone [x]", "a", 1)])


def test_a_build_prints_what_it_did(tmp_path: Path) -> None:
    rollouts(tmp_path)
    command = [sys.executable, "-m", "megadpo", "pairs", "rollouts.jsonl", "-o", "pairs.jsonl"]
    done = subprocess.run([*command, "--pairing", "all"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    for text in (
        "18 rows in 1 file, 1 of them unusable",
        "17 rollouts, reward 0.4",
        "5 groups by input (no rollout has _ng_task_index), of 1 to 4 rollouts",
        "4 groups with pairs, 1 without",
        "20 pairs (all --min-gap 0.1), from 16 rollouts",
        "no reward │ 1 │ rollouts.jsonl:17",
        "one rollout │ 1 │ rollouts.jsonl:18",
        "0.5 4 █",
        "0.85 4 █",
        "chosen is longer in 100.0% of the pairs",
        "│ 0 │ 24 │ 4 │",
        "│ 0.5 │ 12 │ 4 │",
        "wrote pairs.jsonl: 20 pairs; pairs.rejected.jsonl: 2 left out",
    ):
        assert text in said, f"{text!r} not in\n{done.stdout}"
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pairs.jsonl",
        "pairs.rejected.jsonl",
        "rollouts.jsonl",
    ]


def test_no_pair_is_a_refusal_with_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "r.jsonl", [current("q", "a", 1), current("q", "b", 1)])
    assert main(["pairs", str(path), "-o", str(tmp_path / "pairs.jsonl")]) == 2
    said = capsys.readouterr()
    assert "equal rewards" in said.out and "no other --min-gap would give a pair" in said.out
    assert "no pair" in said.err and "not written" in said.err
    assert json.loads((tmp_path / "pairs.rejected.jsonl").read_text())["reason"] == "equal_rewards"
    assert not (tmp_path / "pairs.jsonl").exists()


def test_every_wrong_option_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(rollouts(tmp_path))
    wrong = (
        "--min-gap -1 --max-length-ratio 0.5 --min-chosen-reward nan --max-pairs-per-prompt 0 --num-repeats 1 "
        "--group-by input --seed 3 --report report.pdf"
    )
    assert main(["pairs", path, path, "-o", str(tmp_path / "absent/pairs.txt"), *wrong.split()]) == 2
    said = capsys.readouterr().err
    for flag in ("min-gap", "max-length-ratio", "min-chosen-reward", "max-pairs-per-prompt", "num-repeats", "seed"):
        assert f"  --{flag}: got" in said, flag
    for text in ("given twice", "ends in .html or .png", "ends in .jsonl", "create the folder", "no --group-by input"):
        assert text in said, text


@pytest.mark.parametrize(
    "options",
    ["--seed 1", "--match-lengths --pairing random", "--max-pairs-per-prompt 2", "--num-repeats 2 --group-by task"],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, options: str) -> None:
    command = [str(rollouts(tmp_path)), "-o", str(tmp_path / "pairs.jsonl")]
    assert main(["pairs", *command, *options.split()]) == 2
    assert not (tmp_path / "pairs.jsonl").exists()


@pytest.mark.parametrize("output", ["rollouts.jsonl", "link.jsonl"])
def test_rollouts_are_never_overwritten(tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = rollouts(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_bytes()
    assert main(["pairs", str(path), "-o", str(tmp_path / output)]) == 2
    assert "would be overwritten" in capsys.readouterr().err and path.read_bytes() == before


def test_the_rejected_file_never_overwrites_rollouts(tmp_path: Path) -> None:
    path = rollouts(tmp_path, "pairs.rejected.jsonl")
    before = path.read_bytes()
    assert main(["pairs", str(path), "-o", str(tmp_path / "pairs.jsonl")]) == 2
    assert path.read_bytes() == before


def test_the_report_as_html_and_as_a_picture(tmp_path: Path) -> None:
    command = [str(rollouts(tmp_path)), "-o", str(tmp_path / "pairs.jsonl"), "--report"]
    assert main(["pairs", *command, str(tmp_path / "report.html")]) == 0
    html = (tmp_path / "report.html").read_text()
    assert "pairs at other gaps" in html and "length bias" in html and "unusable" in html
    assert main(["pairs", *command, str(tmp_path / "report.png")]) == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))


def test_a_picture_of_no_pair_is_drawn_too(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [current("q", "a", 1), b'{"$x_{"'])  # no mathematics of matplotlib's
    command = [str(path), "-o", str(tmp_path / "pairs.jsonl"), "--report"]
    assert main(["pairs", *command, str(tmp_path / "report.png")]) == 2
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    write(path, [b"{"])
    assert main(["pairs", *command, str(tmp_path / "report.html")]) == 2


def test_a_picture_without_matplotlib_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    command = [str(rollouts(tmp_path)), "-o", str(tmp_path / "pairs.jsonl"), "--report", str(tmp_path / "r.png")]
    assert main(["pairs", *command]) == 2
    assert "pip install 'megadpo[report]'" in capsys.readouterr().err
    assert not (tmp_path / "pairs.jsonl").exists()
