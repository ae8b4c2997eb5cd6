"""What can't be laid out is refused with its reason before any process group is made."""

from __future__ import annotations

import pytest

from megadpo.commands import main
from megadpo.train import command
from tests.layouts.impossible import IMPOSSIBLE
from tests.layouts.matrix import as_overrides
from tests.layouts.models import MODELS


def refused_start(bench, monkeypatch, capsys, model, world_size, overrides):
    """What a rank of torchrun prints that is refused; fails where it goes on to make process groups."""
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(
        command, "run_training", lambda cfg, started_s: pytest.fail(f"{overrides} on {world_size} is let run")
    )
    config = str(bench.config(model))
    capsys.readouterr()
    assert main(["train", config, *overrides]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("one", IMPOSSIBLE, ids=lambda one: f"{one.model}-{one.world_size}-{as_overrides(one.values)}")
def test_refused_by_name(one, bench, monkeypatch, capsys):
    model = next(model for model in MODELS if model.name == one.model)
    printed = refused_start(bench, monkeypatch, capsys, model, one.world_size, as_overrides(one.values))
    count, *problems = printed.splitlines()
    assert count == f"refused, {len(problems)} problem(s):"
    assert all(problem.startswith(f"  {one.field}: got ") for problem in problems), printed
