"""Grouping: by task, by input, by consecutive rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.problems import DataError
from megadpo.rollouts.group import Grouping, group_by_input, group_by_task, group_consecutive, group_rollouts
from tests.rollouts.builders import rollout


def lines(grouping: Grouping) -> list[list[int]]:
    return [[one.line for one in group.rollouts] for group in grouping.groups]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from(["", "a"])), max_size=12))
def test_groups_split_the_rollouts_by_prompt_and_agent_and_lose_none(rows):
    rollouts = [
        rollout(0, line=n, task=task, prompt=prompt, agent=agent)
        for n, (task, prompt, agent) in enumerate(rows, start=1)
    ]
    for grouping in (group_by_task(rollouts), group_by_input(rollouts)):
        assert sorted(line for group in lines(grouping) for line in group) == [one.line for one in rollouts]
        firsts = [group[0] for group in lines(grouping)]
        assert firsts == sorted(firsts)
        assert all(group == sorted(group) for group in lines(grouping))
        for group in grouping.groups:
            assert len({(one.prompt, one.agent) for one in group.rollouts}) == 1
    assert len(group_by_input(rollouts).groups) == len({(prompt, agent) for _, prompt, agent in rows})
    assert len(group_by_task(rollouts).groups) == len(set(rows))


def test_a_task_that_deals_anew_is_split_and_said():
    rollouts = [rollout(0, line=1, task=0, prompt=0), rollout(1, line=2, task=0, prompt=1), rollout(1, line=3, task=1)]
    grouping = group_by_task(rollouts)
    assert lines(grouping) == [[1], [2], [3]]
    assert [group.of_split_task for group in grouping.groups] == [True, True, False]
    assert grouping.split_tasks == ["rollouts.jsonl: task 0 has 2 different inputs (lines 1, 2)"]


def test_tasks_of_two_files_may_have_the_same_number():
    rollouts = [rollout(0, line=1, task=0, prompt=0, path="a"), rollout(1, line=2, task=0, prompt=1, path="b")]
    assert lines(group_by_task(rollouts)) == [[1], [2]] and group_by_task(rollouts).split_tasks == []
    shards = [rollout(0, line=1, task=0, path="a"), rollout(1, line=2, task=0, path="b")]
    assert lines(group_by_task(shards)) == [[1, 2]]


def test_automatic_grouping_needs_every_task_index():
    with_index = [rollout(0, line=1, task=5), rollout(1, line=2, task=6)]
    assert lines(group_rollouts(with_index)) == [[1], [2]]
    mixed = [*with_index, rollout(1, line=3)]
    assert lines(group_rollouts(mixed)) == [[1, 2, 3]]
    assert "1 of 3 rollouts lack" in group_rollouts(mixed).how
    assert "no rollout has" in group_rollouts([rollout(0)]).how


def test_consecutive_rows_keep_the_places_of_unusable_ones():
    # rows 1-3 | 4-6 | 7; row 5 was unusable
    rollouts = [rollout(0, line=line, prompt=line > 3) for line in (1, 2, 3, 4, 6)] + [rollout(0, line=7, prompt=2)]
    grouping = group_consecutive(rollouts, {"rollouts.jsonl": 7}, 3)
    assert lines(grouping) == [[1, 2, 3], [4, 6], [7]]
    assert grouping.how == "by 3 consecutive rows; the last group of rollouts.jsonl has 1"


def test_consecutive_rows_never_cross_files():
    rollouts = [rollout(0, line=1, path="a"), rollout(0, line=1, path="b"), rollout(0, line=2, path="b")]
    assert [len(group.rollouts) for group in group_consecutive(rollouts, {"a": 1, "b": 2}, 2).groups] == [1, 2]


def test_consecutive_rows_of_different_inputs_are_refused_with_their_lines():
    rollouts = [rollout(0, line=line, prompt=prompt) for line, prompt in enumerate([0, 0, 1, 1, 1, 2], start=1)]
    with pytest.raises(DataError) as refused:
        group_consecutive(rollouts, {"rollouts.jsonl": 6}, 3)
    assert [problem.where for problem in refused.value.problems] == ["rollouts.jsonl:3", "rollouts.jsonl:6"]
    assert "line 1" in str(refused.value) and "--group-by input" in str(refused.value)
    many = [rollout(0, line=line, prompt=line) for line in range(1, 101)]
    with pytest.raises(DataError) as refused:
        group_consecutive(many, {"rollouts.jsonl": 100}, 2)
    assert len(refused.value.problems) == 21 and "30 more" in str(refused.value.problems[-1])
