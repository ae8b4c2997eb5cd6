"""The optimizer's step count, on ranks that count and on those that have nothing to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megadpo.optimizer.state import _steps_done
from tests.helpers.distributed import run_distributed


def steps_of(counts: list[list[int]], in_groups: bool) -> float:
    mine = [{"step": torch.tensor(float(count))} for count in counts[torch.distributed.get_rank()]]
    state, groups = ([], mine) if in_groups else (mine, [{"lr": 1.0}])
    return float(
        _steps_done(SimpleNamespace(optimizer=SimpleNamespace(state=dict(enumerate(state)), param_groups=groups)))
    )


@pytest.mark.distributed
@pytest.mark.parametrize("in_groups", [False, True])
def test_every_rank_knows_the_steps_of_those_that_count(in_groups):
    assert run_distributed(steps_of, 3, [[7, 7], [], [7]], in_groups) == [7, 7, 7]
