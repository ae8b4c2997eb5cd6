"""What CONTRIBUTING.md promises of the code: lengths of files and functions, and that no class name occurs twice."""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megadpo"
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
"""Lines from `def` to the last statement, docstring included."""


def too_long(path: Path) -> Iterator[str]:
    """Everything in a file that is longer than promised, as "file:line: what"."""
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > LONGEST_FILE:
        yield f"{path}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_files_and_functions_are_as_short_as_promised() -> None:
    assert [found for path in sorted(PACKAGE.rglob("*.py")) for found in too_long(path)] == []


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    path = tmp_path / "long.py"
    path.write_text("def f():\n" + "    x = 1\n" * LONGEST_FUNCTION + "\n" * LONGEST_FILE)
    assert [found.partition(": ")[2] for found in too_long(path)] == ["461 lines", "f has 61 lines"]


def test_no_class_name_occurs_twice() -> None:
    """Private names too: who searches for a class finds one."""
    places = collections.defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{path.relative_to(PACKAGE)}")
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
