"""tools/plot_run.py: a picture of a run's metrics, and what is refused."""

from __future__ import annotations

import json

from tools import plot_run


def test_a_picture_is_drawn_and_bad_arguments_are_refused_together(tmp_path, capsys):
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curve.svg"
    rows = [{"step": step, "train/loss": 0.5, "validation-a/loss": None, "timing/train/x": 1.0} for step in (1, 2)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_run.main([str(metrics), "-o", str(picture), "--mark", "1"]) == 0
    assert picture.read_text().startswith("<?xml")
    assert plot_run.main([str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "no/curve.bogus")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("refused, 3 problem(s):") and "none.jsonl: got " in said and said.count("--output: ") == 2
    metrics.write_text("policy: {}\n")
    assert plot_run.main([str(metrics), "-o", str(picture)]) == 2
