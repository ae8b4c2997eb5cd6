"""Where rewards come from, and what is none."""

from __future__ import annotations

import pytest

from megadpo.collect.rewards import load_reward_function, with_reward
from megadpo.config.problems import ConfigError


@pytest.mark.parametrize(
    "name", ["rewards", "rewards.py:score", "no_such_module:score", "json:no_such", "json:__doc__"]
)
def test_a_reward_function_that_is_not_there(name):
    with pytest.raises(ConfigError, match="reward_function"):
        load_reward_function(name)


def test_a_reward_is_a_finite_number():
    assert with_reward({"reward": True, "why": "x"}, "f") == {"reward": 1.0, "why": "x"}
    for bad in (None, "1", float("inf"), [1], {}):
        with pytest.raises(Exception, match="expected a finite number"):
            with_reward({"reward": bad}, "f")
    for bad in ({1, 2}, float("nan"), object()):
        with pytest.raises(Exception, match="written as JSON"):
            with_reward({"reward": 1.0, "field": bad}, "f")
