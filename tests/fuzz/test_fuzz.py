"""Some cases of `make fuzz`."""

from __future__ import annotations

import pytest

from megadpo.config.problems import ConfigError, Problem
from tests.fuzz import mutate
from tests.fuzz.cases import CASES
from tests.fuzz.mutate import outcome


@pytest.mark.parametrize(("name", "count"), [("configs", 20), ("rows", 20), ("checkpoints", 10)])
def test_what_is_damaged_is_read_or_refused_in_words(name, count, tmp_path):
    case = CASES[name](tmp_path, 1)
    outcomes = [case(number) for number in range(count)]
    assert [why for kind, why in outcomes if kind == "failed"] == []
    assert "refused" in {kind for kind, _ in outcomes}


def test_what_counts_as_a_failure(monkeypatch):
    def refuse():
        raise ConfigError(Problem("a", 1, "2", "say 2"))

    def endless():
        while True:
            pass

    assert outcome(lambda: 1) == ("read", "")
    assert outcome(refuse) == ("refused", "")
    assert outcome(lambda: 1 // 0)[0] == "failed"
    monkeypatch.setattr(mutate, "LONGEST_S", 1)
    assert "not done after 1 s" in outcome(endless)[1]
