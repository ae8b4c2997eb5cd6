"""docs/layouts.md says what the options, the models and the config check say now, and `megadpo train` refuses what it says."""

from __future__ import annotations

import dataclasses

import pytest

from tests.layouts.matrix import MOST_PROCESSES, all_cases
from tests.layouts.prove import Proved
from tests.layouts.table import COMMAND, PAGE, read, render
from tests.layouts.test_impossible import refused_start


def what_the_check_says(bench, ran):
    """Results as the check decides now, with the differences of cases that it lets run taken from `ran`."""
    results, unproved = {}, []
    for case in all_cases():
        refused = tuple(map(str, bench.problems(case.model, case.overrides, case.world_size)))
        results[case.name] = Proved(refused=refused)
        if not refused and case.world_size <= MOST_PROCESSES:
            if case.name not in ran:
                unproved.append(case.name)
            results[case.name] = Proved(relative=ran.get(case.name, 1.0))
    return results, unproved


def test_the_page_is_current(bench):
    text = PAGE.read_text()
    ran, run = read(text)
    results, unproved = what_the_check_says(bench, ran)
    assert not unproved, f"{len(unproved)} cases may run now and have not been proved; {COMMAND}: {unproved[:5]}"
    written = render(results, bench.impossible(), run)
    assert written == text, f"{PAGE.name} differs from the options or the check's reasons: {COMMAND}"


def test_a_page_that_is_not_current_is_noticed(bench):
    ran, run = read(PAGE.read_text())
    case = next(case for case in all_cases() if case.name in ran)
    results, unproved = what_the_check_says(bench, {k: v for k, v in ran.items() if k != case.name})
    assert unproved == [case.name]
    results[case.name] = dataclasses.replace(results[case.name], refused=("a reason",), relative=None)
    assert render(results, bench.impossible(), run) != PAGE.read_text()


def test_what_is_written_is_read_back(bench):
    results, _ = what_the_check_says(bench, {})
    results = {name: Proved(one.refused, one.relative and 3e-7) for name, one in results.items()}
    ran, run = read(render(results, bench.impossible(), "then and there"))
    assert run == "then and there"
    assert ran == {name: one.relative for name, one in results.items() if one.relative}
    assert ran[all_cases()[0].name] == pytest.approx(3e-7)


def test_refused_pairs_of_the_matrix(bench, monkeypatch, capsys):
    """Each distinct reason once."""
    seen = set()
    for case in all_cases():
        reasons = tuple(map(str, bench.problems(case.model, case.overrides, case.world_size)))
        if reasons and reasons not in seen:
            seen.add(reasons)
            printed = refused_start(bench, monkeypatch, capsys, case.model, case.world_size, case.overrides)
            assert all(reason in printed for reason in reasons)
    assert seen
