"""Ten kills of `make crash-test`, in the phases of one run."""

from __future__ import annotations

import pytest

from tests.crash import stories
from tests.crash.rank import EXPORT
from tests.crash.stories import IMPORTS, PHASES, World, crash


@pytest.mark.distributed
def test_killed_runs_go_on_to_the_same_bits_and_leave_nothing(tmp_path, monkeypatch):
    phases = [phase for phase in PHASES if phase != IMPORTS]
    assert len(phases) >= 10 and EXPORT in phases
    monkeypatch.setattr(stories, "MOST_KILLS_A_RUN", 10)  # in one run: each has its price
    said: list[str] = []
    count = crash(World(tmp_path), [*enumerate(phases[-10:])], 0, said.append)
    assert count.is_good, "\n".join([*said, *count.table()])
    assert sum(count.kills.values()) == 10
