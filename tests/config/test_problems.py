"""What a refusal says."""

from __future__ import annotations

from megadpo.config import EXIT_REFUSED, ConfigError, DataError, Problem, UserError


def test_a_refusal_exits_with_2():
    assert EXIT_REFUSED == 2


def test_a_problem_is_one_line_and_an_error_carries_all():
    problems = [Problem("a.b", "two\nlines", "x", "y"), Problem("c", "z" * 500, "x", "y")]
    error = DataError(problems)
    assert isinstance(error, UserError) and error.problems == problems
    lines = str(error).splitlines()
    assert lines[0] == "a.b: got 'two\\nlines'; expected x; fix: y"
    assert len(lines) == 2 and len(lines[1]) < 300
    assert ConfigError(problems[0]).problems == problems[:1]
