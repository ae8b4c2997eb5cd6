"""Files that a command is to write: their folder, their name's ending, matplotlib."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.config.output_files import output_problems, picture_problems


def test_no_path_and_a_good_path_have_no_problem(tmp_path: Path) -> None:
    assert list(output_problems("--table", None, [".csv"])) == list(picture_problems("--output", None)) == []
    assert list(output_problems("--table", tmp_path / "A.CSV", [".csv"])) == []
    assert list(output_problems("--trace", tmp_path / "any.name")) == []


def test_folder_and_ending_are_reported_together(tmp_path: Path) -> None:
    folder, ending = output_problems("--table", tmp_path / "none" / "runs.txt", [".csv", ".tsv"])
    assert (folder.where, folder.fix) == ("--table", f"create the folder {tmp_path / 'none'}")
    assert ending.expected == "a name that ends in .csv or .tsv"


def test_a_picture_has_any_kind_that_matplotlib_writes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert list(picture_problems("--output", tmp_path / "curves.pdf")) == []
    (problem,) = picture_problems("--output", tmp_path / "curves.bogus")
    assert ".svg" in problem.expected
