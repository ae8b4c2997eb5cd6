"""Every file that a document names is there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"),
    *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")),
]
NAMED = re.compile(r"(?<![\w/.{<*-])((?:[A-Za-z_][\w.-]*/)+[\w.-]+\.(?:py|md|yaml|json|sh|png|svg|txt))(?![\w*}>])")
"""A path with a folder in it, such as train/step.py."""
OUTSIDE = {"transformer_engine", "megatron", "transformers", "examples", "torch", "moe", "dist_checkpointing"}
"""First folders of other projects' files."""
WRITTEN = re.compile(r"^(logs|results/dpo|demo_run|step_\w*|checkpoints|hf|rng|model|reference|trained)/")
"""What runs write, and users' own files."""


def tracked() -> frozenset[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, text=True, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return frozenset(listed.stdout.splitlines())


def missing(text: str, folder: str, files: frozenset[str]) -> Iterator[str]:
    """Names of files in `text`, a document in `folder`, that no file ends with."""
    for name in NAMED.findall(text):
        if name.split("/")[0] in OUTSIDE or WRITTEN.search(name):
            continue
        if f"{folder}/{name}".lstrip("./") not in files and not any(
            file == name or file.endswith("/" + name) for file in files
        ):
            yield name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_it_names_is_there(document: str) -> None:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    assert list(missing(text, str(Path(document).parent), tracked())) == []


def test_a_file_that_is_not_there_is_found() -> None:
    text = "see `train/no_such_step.py`, train/step.py and [this](docs/nowhere.md), results in results/2026_x.json"
    assert list(missing(text, ".", tracked())) == ["train/no_such_step.py", "docs/nowhere.md", "results/2026_x.json"]
