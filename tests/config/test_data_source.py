"""What a text names: a file, a folder, or a dataset of the hub."""

from __future__ import annotations

import pytest

from megadpo.config.data_source import DataSource, file_suffix, parse_source

TEXTS = {
    "pairs.jsonl": DataSource("pairs.jsonl"),
    "a:b@c/pairs.json.gz": DataSource("a:b@c/pairs.json.gz"),
    "org/name": DataSource("org/name"),
    "org/name:subset": DataSource("org/name", "subset"),
    "org/name@test": DataSource("org/name", None, "test"),
    "org/name:subset@train[:90%]": DataSource("org/name", "subset", "train[:90%]"),
    "org/name@train[10:20]": DataSource("org/name", None, "train[10:20]"),
    "/data/folder:subset@test": DataSource("/data/folder", "subset", "test"),
    "pairs.parquet@test": DataSource("pairs.parquet", None, "test"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_apart_and_put_together_again(text: str) -> None:
    assert parse_source(text) == TEXTS[text] and str(TEXTS[text]) == text


@pytest.mark.parametrize(
    ("path", "is_file", "is_hub_name"),
    [
        ("org/name", False, True),
        ("org/name.v2", False, True),
        ("org/name.jsonl", True, False),
        ("name", False, False),
        ("/org/name", False, False),
        ("a/b/c", False, False),
        ("Org-1/na_me", False, True),
    ],
)
def test_files_and_hub_names_are_told_apart(path: str, is_file: bool, is_hub_name: bool) -> None:
    assert (DataSource(path).is_file, DataSource(path).is_hub_name) == (is_file, is_hub_name)


@pytest.mark.parametrize(
    ("path", "suffix"),
    [("A.JSONL.GZ", ".jsonl"), ("a.csv.zst", ".csv"), ("a.arrow", ".arrow"), ("a.txt", None), ("a.gz", None)],
)
def test_the_kind_of_a_file(path: str, suffix: str | None) -> None:
    assert file_suffix(path) == suffix
