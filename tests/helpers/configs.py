"""Fixtures of tests that read configs (every test has them): the smallest config, files on disk, what a refusal says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megadpo.config import Config, ConfigError, Problem, build_config

Tree = dict[str, Any]


def tree_with(**dotted: Any) -> Tree:
    """The smallest config that loads, changed at dotted paths written with `__` for the dot."""
    tree: Tree = {"policy": {"model_name": "some/model"}, "data": {"train_data_path": "train.jsonl"}}
    for name, value in dotted.items():
        *above, last = name.split("__")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


@pytest.fixture
def config() -> Callable[..., Config]:
    """config(policy__precision="float32") -> the checked Config."""
    return lambda **dotted: build_config(tree_with(**dotted))


@pytest.fixture
def refusals() -> Callable[..., dict[str, Problem]]:
    """refusals(tree, or the keywords of `config`) -> {where: Problem}; fails where nothing is refused."""

    def collect(tree: Mapping[str, Any] | None = None, **dotted: Any) -> dict[str, Problem]:
        with pytest.raises(ConfigError) as caught:
            build_config(tree_with(**dotted) if tree is None else tree)
        found = {problem.where: problem for problem in caught.value.problems}
        assert len(found) == len(caught.value.problems), "one mistake was reported twice"
        return found

    return collect


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """write(name, text) -> path of the new file."""

    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file
