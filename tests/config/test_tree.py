"""YAML, defaults, interpolation, overrides."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError, load_config

SMALL = "policy: {model_name: m}\ndata: {train_data_path: t.jsonl}\n"


def problems_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_interpolation(write):
    path = write(
        "c.yaml",
        "policy: {model_name: m, max_total_sequence_length: 100, tokenizer: {name: '${policy.model_name}'},\n"
        "  sequence_packing: {train_mb_tokens: '${mul:${policy.max_total_sequence_length},3}'}}\n"
        "dpo: {preference_average_log_probs: true, sft_average_log_probs: '${.preference_average_log_probs}'}\n"
        "data: {train_data_path: t.jsonl}\n",
    )
    cfg = load_config(path, ["policy.model_name=n"])
    assert cfg.policy.tokenizer.name == "n", "overrides come before interpolation"
    assert cfg.policy.sequence_packing.train_mb_tokens == 300
    assert cfg.dpo.sft_average_log_probs is True


def test_every_failed_interpolation_is_listed(write):
    path = write(
        "c.yaml",
        "policy: {model_name: '${nope}', precision: '${policy.gone}'}\n"
        "dpo: {seed: '???', val_period: '${mul:x,y}'}\ndata: {train_data_path: '${data.train_data_path}'}\n",
    )
    found = {problem.where: problem for problem in problems_of(path)}
    assert found["dpo.seed"].expected == "a value"
    assert sorted(found) == [
        "data.train_data_path",
        "dpo.seed",
        "dpo.val_period",
        "policy.model_name",
        "policy.precision",
    ]


def test_interpolation_that_cannot_be_parsed(write):
    (problem,) = problems_of(write("c.yaml", SMALL + "dpo: {seed: '${'}\n"))
    assert "c.yaml" in problem.where
    (problem,) = problems_of(write("c.yaml", SMALL), "dpo.seed=${")
    assert (problem.where, problem.value) == ("command line", "dpo.seed=${")


def test_interpolation_that_never_ends(write):
    (problem,) = problems_of(write("c.yaml", "dpo: {reference: '${policy}'}\npolicy: {tokenizer: '${dpo}'}\n"))
    assert problem.where == "dpo.reference" and "itself" in problem.fix


def test_defaults_merge_in_order_and_the_file_wins(write):
    write("base/one.yaml", SMALL + "dpo: {seed: 1, val_period: 1, val_batches: 1}\n")
    write("base/two.yaml", "defaults: one.yaml\ndpo: {seed: 2, val_batches: 2}\n")
    write("extra.yaml", "logger: {wandb: {project: p, name: extra}}\n")
    path = write("c.yaml", "defaults:\n  - base/two.yaml\n  - extra.yaml\ndpo: {seed: 3}\nlogger: {wandb: {name: c}}\n")
    cfg = load_config(path, ["dpo.val_global_batch_size=4"])
    assert (cfg.dpo.seed, cfg.dpo.val_batches, cfg.dpo.val_period, cfg.dpo.val_global_batch_size) == (3, 2, 1, 4)
    assert (cfg.logger.loggers["wandb"].project, cfg.logger.loggers["wandb"].name) == ("p", "c")


def test_override_marker_replaces_a_section(write):
    write("base.yaml", SMALL + "logger: {log_dir: l, wandb: {project: p}}\n")
    path = write("c.yaml", "defaults: base.yaml\nlogger: {wandb: {_override_: true, name: n}}\n")
    cfg = load_config(path)
    assert (cfg.logger.log_dir, cfg.logger.loggers["wandb"].project, cfg.logger.loggers["wandb"].name) == (
        "l",
        None,
        "n",
    )


def test_a_cycle_of_defaults_is_named(write):
    write("b.yaml", "defaults: c.yaml\n")
    write("c.yaml", "defaults: a.yaml\n")
    (problem,) = problems_of(write("a.yaml", "defaults: b.yaml\n"))
    assert "defaults" in problem.where and problem.expected == "no cycle"
    assert all(name in str(problem.value) for name in ("a.yaml", "b.yaml", "c.yaml"))


def test_same_parent_twice_is_no_cycle(write):
    write("base.yaml", SMALL)
    write("left.yaml", "defaults: base.yaml\n")
    write("right.yaml", "defaults: base.yaml\n")
    assert load_config(write("c.yaml", "defaults: [left.yaml, right.yaml]\n")).policy.model_name == "m"


BAD_FILES = [
    ("'1'\n", "c.yaml"),  # a text that is no mapping either
    ("policy: [1\n", "c.yaml:"),
    ("policy: {model_name: m}\npolicy: {model_name: n}\n", "c.yaml:2"),
    ("- a\n- b\n", "c.yaml"),
    ("defaults: [1]\n", "defaults"),
    ("defaults: gone.yaml\n", "defaults"),
]


@pytest.mark.parametrize(("text", "where"), BAD_FILES)
def test_bad_file_is_one_clear_problem(write, text, where):
    (problem,) = problems_of(write("c.yaml", text))
    assert where in problem.where


@pytest.mark.parametrize("name", ["gone.yaml", "."])
def test_missing_file(tmp_path, name):
    (problem,) = problems_of(tmp_path / name)
    assert str(tmp_path) in str(problem.value)


OVERRIDES = [
    ("dpo.seed=7", ("dpo", "seed"), 7),
    ("+dpo.seed=7", ("dpo", "seed"), 7),
    ("++dpo.seed=7", ("dpo", "seed"), 7),
    ("~dpo.seed", ("dpo", "seed"), 42),
    ("~dpo.seed=5", ("dpo", "seed"), 42),
    ("policy.megatron_cfg.optimizer.lr=5e-7", ("policy", "megatron_cfg", "optimizer", "lr"), 5e-7),
    ("dpo.max_num_steps=null", ("dpo", "max_num_steps"), None),
    ("dpo.val_at_start=false", ("dpo", "val_at_start"), False),
    ("policy.model_name=a=b", ("policy", "model_name"), "a=b"),
    ("policy.model_name='with space'", ("policy", "model_name"), "with space"),
    ("data.val_data_paths.held-out=v.jsonl", ("data", "val_data_paths"), {"held-out": "v.jsonl"}),
    ("policy.megatron_cfg.recompute_modules=[mlp]", ("policy", "megatron_cfg", "recompute_modules"), ("mlp",)),
]


@pytest.mark.parametrize(("override", "path", "wanted"), OVERRIDES)
def test_override(write, override, path, wanted):
    value = load_config(write("c.yaml", SMALL + "dpo: {seed: 5}\n"), [override])
    for name in path:
        value = getattr(value, name)
    assert value == wanted


@pytest.mark.parametrize(
    "override",
    [
        *("dpo.seed", "=3", "dpo..seed=3", "~dpo.gone", "dpo.seed.x=3", "dpo.seed=[1", "~nosection.x"),
        *("~dpo.seed=6", "+~dpo.seed=5", "+++dpo.seed=5"),
    ],
)
def test_bad_override_is_shown_as_written(write, override):
    problems = problems_of(write("c.yaml", SMALL + "dpo: {seed: 5}\n"), override)
    assert [(problem.where, problem.value) for problem in problems] == [("command line", override)]


def test_unknown_override_key_is_refused_like_any_other(write):
    (problem,) = problems_of(write("c.yaml", SMALL), "+dpo.sed=3")
    assert problem.where == "dpo.sed" and "dpo.seed" in problem.fix


KEYS = 'data: {train_data_path: t, val_data_paths: {1: a, 01: b, no: c, 1.5: d, null: e, ok: f, "yes": g}}\n'


def test_keys_that_yaml_takes_for_something_else_are_named_with_their_line(write):
    path = write("c.yaml", "policy: {model_name: m}\n" + KEYS)
    problems = problems_of(path)
    assert {one.where for one in problems} == {f"{path}:2"} and {one.fix for one in problems} == {"put it in quotes"}
    assert [one.value for one in problems] == [f"the key {name}" for name in ("01", "no", "1.5", "null")]
    (problem,) = problems_of(write("d.yaml", SMALL), "data.val_data_paths={no: a}")
    assert problem.where == "command line: data.val_data_paths" and "reads it as bool" in problem.expected


def test_every_missing_default_and_odd_marker_is_listed(write):
    path = write("c.yaml", SMALL + "defaults: [no1.yaml, no2.yaml]\ndpo: {_override_: maybe}\n")
    problems = problems_of(path)
    assert [one.where for one in problems] == [f"{path}: dpo._override_", f"{path}: defaults", f"{path}: defaults"]
    assert [str(one.value).rpartition("/")[2] for one in problems] == ["maybe", "no1.yaml", "no2.yaml"]


def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(SMALL.encode() + "# caf\u00e9\n".encode("latin-1"))
    (problem,) = problems_of(path)
    assert (problem.where, problem.value, problem.expected) == (f"{path}:3", "the byte 0xe9", "UTF-8")
