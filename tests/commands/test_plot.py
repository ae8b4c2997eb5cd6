"""`megadpo plot`: a table and a picture of several runs, and what is refused."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from megadpo.commands import main, plot


def write_run(folder: Path, losses: list[float], validation: dict[int, float]) -> Path:
    """metrics.jsonl with a training loss a step, and validation losses by step."""
    folder.mkdir(parents=True)
    rows = []
    for step, loss in enumerate(losses, start=1):
        row = {"step": step, "train/loss": loss, "train/rewards/margins": None, "timing/train/x": 1.0}
        rows.append(row | ({"validation-a/loss": validation[step]} if step in validation else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs/low/logs", [0.7, 0.5, 0.3], {2: 0.6, 3: 0.65})
    write_run(tmp_path / "runs/high/logs", [0.7, 0.6], {})
    return tmp_path / "runs"


def test_runs_are_found_compared_and_drawn(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, picture = tmp_path / "runs.csv", tmp_path / "curves.svg"
    assert main(["plot", str(runs), "--smooth", "2", "--table", str(table), "-o", str(picture), "--mark", "1"]) == 0
    shown = capsys.readouterr().out
    with table.open() as file:
        high, low = csv.DictReader(file)
    assert (high["run"], low["run"]) == ("high/logs", "low/logs") and "low/logs" in shown
    assert float(low["train/loss"]) == pytest.approx(0.4) and float(high["train/loss"]) == pytest.approx(0.65)
    assert (low["step"], low["validation-a/loss"]) == ("3", "0.65") and high["validation-a/loss"] == ""
    assert (low["validation-a/lowest loss"], low["validation-a/lowest loss at step"]) == ("0.6", "2")
    assert picture.read_text().startswith("<?xml")


def test_a_file_and_a_log_dir_name_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(runs / "low/logs/metrics.jsonl"), str(runs / "high/logs"), str(runs / "low/logs")]) == 0
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split() == ["low/logs", "high/logs"]


def test_a_curve_is_a_mean_of_the_steps_before() -> None:
    assert plot._smoothed([4.0, 2.0, 0.0, 1.0], 2) == [4.0, 3.0, 1.0, 0.5]
    assert plot._smoothed([4.0, 2.0], 1) == [4.0, 2.0]


def test_what_cannot_be_drawn_is_refused_at_once(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.jsonl").write_text("policy: {}\n")
    given = [str(tmp_path / "empty"), str(tmp_path / "no.jsonl"), str(runs)]
    wrong = ["-o", str(tmp_path / "none/curve.bogus"), "--smooth", "0", "--table", "runs.txt"]
    assert main(["plot", *given, *wrong]) == 2
    said = capsys.readouterr().err
    for part in ("refused, 6 problem(s)", "--output: got", "--smooth: got 0", "--table: got", "no metrics.jsonl"):
        assert part in said, said
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert main(["plot", str(runs), "-o", str(tmp_path / "curve.png")]) == 2
    assert "pip install 'megadpo[report]'" in capsys.readouterr().err
    assert main(["plot", str(runs)]) == 0
