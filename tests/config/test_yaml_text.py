"""YAML that would never end, ask for too much, or is not of the type it names: refused with its line."""

from __future__ import annotations

import os

import pytest

from megadpo.config import ConfigError, load_config

SMALL = "policy: {model_name: m}\ndata: {train_data_path: t.jsonl}\n"


def only_problem(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n", "a: &a {b: [1, {c: *a}]}\n"])
def test_an_alias_to_itself_is_refused(write, text):
    path = write("c.yaml", SMALL + text)
    problem = only_problem(path)
    assert problem.where == f"{path}:3" and "an alias inside" in str(problem.value)
    problem = only_problem(write("c.yaml", SMALL), "dpo.seed=&a [*a]")
    assert problem.where == "command line: dpo.seed"


@pytest.mark.timeout(20)
def test_aliases_of_aliases_are_counted(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    problem = only_problem(write("c.yaml", SMALL + "\n".join(lines) + "\n"))
    assert "aliases for" in str(problem.value)


@pytest.mark.parametrize("value", ["!!float x", "!!int q", "!!timestamp q", "!!int ''", "!!bool maybe", "[" * 3000])
def test_a_value_that_is_not_of_its_tag(write, value):
    path = write("c.yaml", SMALL + f"dpo: {{seed: {value}}}\n")
    assert str(path) in only_problem(path).where
    assert only_problem(write("c.yaml", SMALL), f"dpo.seed={value}").where.startswith("command line")


@pytest.mark.timeout(20)
def test_pipes_devices_and_names_that_are_no_path(write, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "a named pipe" in only_problem(tmp_path / "pipe.yaml").expected
    assert "a device" in only_problem("/dev/zero").expected
    for name in ("a\0b", "x" * 5000, str(tmp_path / "pipe.yaml"), "/dev/zero"):
        path = write("c.yaml", SMALL + "defaults: " + '"' + name.replace("\0", "\\0") + '"\n')
        assert "readable YAML file" in only_problem(path).expected
    path = tmp_path / "large.yaml"
    path.write_text("#" * (4 * 2**20 + 1))
    assert "more than" in only_problem(path).expected
