"""The scripts and commands that GPU tests and benchmarks start are there. Needs no GPU."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STARTERS = sorted([*REPOSITORY.glob("tests/gpu/*.py"), *REPOSITORY.glob("benchmarks/*.py")])
SCRIPT_FOLDERS = ("benchmarks", "launch", "tools", "tests", "docker")


def scripts(text: str) -> Iterator[str]:
    """Strings that are nothing but a script's name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w/]+\.py", node.value):
            yield node.value


def commands(text: str) -> Iterator[str]:
    """`COMMAND` of lists with "megadpo", "COMMAND" in them, and of `launch("COMMAND", ...)`."""
    for node in ast.walk(ast.parse(text)):
        found: list[ast.expr] = []
        if isinstance(node, ast.List):
            values = [getattr(one, "value", None) for one in node.elts]
            found = node.elts[values.index("megadpo") + 1 :][:1] if "megadpo" in values else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
            found = node.args[:1]
        yield from (one.value for one in found if isinstance(one, ast.Constant))


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.stem)
def test_what_it_starts_is_there(path):
    there = {one.as_posix() for folder in SCRIPT_FOLDERS for one in (REPOSITORY / folder).rglob("*.py")}
    text = path.read_text(encoding="utf-8")
    assert [name for name in scripts(text) if not any(one.endswith("/" + name) for one in there)] == []
    assert [name for name in commands(text) if not (REPOSITORY / f"megadpo/commands/{name}.py").exists()] == []


def test_what_is_not_there_is_found():
    text = 'launch("dance", config); run([python, "-m", "megadpo", "sing", "x"], ROOT / "tools" / "gone.py")'
    assert sorted(commands(text)) == ["dance", "sing"] and [name[:4] for name in scripts(text)] == ["gone"]
