"""YAML, defaults, interpolation, overrides, saving; and that none of it needs torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megadpo.config import ConfigError, as_dict, load_config, save_resolved

REPO = Path(__file__).resolve().parents[2]
SMALL = "policy: {model_name: m}\ndata: {train_data_path: t.jsonl}\n"


def problems_of(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads_and_round_trips(path, tmp_path):
    cfg = load_config(path)
    assert cfg.notes == (), "our own configs set nothing that has no effect"
    save_resolved(cfg, tmp_path / "sub" / "resolved.yaml")
    assert load_config(tmp_path / "sub" / "resolved.yaml") == cfg
    assert [one.name for one in (tmp_path / "sub").iterdir()] == ["resolved.yaml"]


def test_odd_values_round_trip(write, tmp_path):
    path = write("c.yaml", SMALL)
    cfg = load_config(
        path,
        [
            "policy.megatron_cfg.optimizer.lr=1e-7",
            r"policy.tokenizer.chat_template='{% for m in messages %}\${x} {{ m }}ü: #{% endfor %}'",
            "policy.tokenizer.chat_template_kwargs={enable_thinking: false, deep: {n: [1, 2.5]}}",
            "data.val_data_paths={a-1: x.jsonl, b: y.jsonl}",
            "checkpointing.checkpoint_must_save_by='00:03:45:00'",
            "dpo.max_num_steps=null",
        ],
    )
    assert "${x}" in cfg.policy.tokenizer.chat_template
    save_resolved(cfg, tmp_path / "r.yaml")
    assert load_config(tmp_path / "r.yaml") == cfg
    assert as_dict(cfg) == as_dict(load_config(tmp_path / "r.yaml"))


def test_as_dict_is_plain_yaml_without_notes(config):
    plain = as_dict(config(policy__megatron_cfg__moe_router_dtype="fp64"))
    assert "notes" not in plain
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


def test_no_torch_and_quick():
    code = (
        "import sys, megadpo.config as c; c.load_config('configs/dpo_megatron.yaml');"
        "print([m for m in ('torch', 'numpy', 'transformers', 'megatron') if m in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.monotonic() - start < 5  # about 0.3 s on a quiet machine


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
    assert (cfg.logger.wandb.project, cfg.logger.wandb.name) == ("p", "c")


def test_override_marker_replaces_a_section(write):
    write("base.yaml", SMALL + "logger: {log_dir: l, wandb: {project: p}}\n")
    path = write("c.yaml", "defaults: base.yaml\nlogger: {wandb: {_override_: true, name: n}}\n")
    cfg = load_config(path)
    assert (cfg.logger.log_dir, cfg.logger.wandb.project, cfg.logger.wandb.name) == ("l", None, "n")


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


TRAINING = ["training.name", "training.num_epochs"]


def test_somebody_elses_section_is_refused_key_by_key(write):
    text = "loss_fn: {reference_policy_kl_penalty: 0.1, deep: {lr: 1}}\ntraining: {num_epochs: 3, name: x}\n"
    problems = {one.where: one.fix for one in problems_of(write("c.yaml", SMALL + text))}
    assert sorted(problems) == ["loss_fn.deep.lr", "loss_fn.reference_policy_kl_penalty", *TRAINING]
    assert problems["training.name"] == "remove it", "several sections have a name"
    assert "did you mean dpo.reference_policy_kl_penalty?" in problems["loss_fn.reference_policy_kl_penalty"]
    assert "policy.megatron_cfg.optimizer.lr" in problems["loss_fn.deep.lr"]
    assert "dpo.max_num_epochs" in problems["training.num_epochs"]


IDLE = {
    "policy.megatron_cfg.optimizer.sgd_momentum": "0.5",
    "policy.megatron_cfg.optimizer.min_lr": "1.0e-7",
    "policy.megatron_cfg.scheduler.lr_decay_iters": "10",
    "policy.megatron_cfg.scheduler.lr_warmup_init": "1.0e-7",
    "policy.train_micro_batch_size": "4",
    "data.num_workers": "7",
    "dpo.val_at_end": "true",
}


def test_options_without_effect_are_noted_each(write):
    path = write("c.yaml", SMALL)
    notes = load_config(path, [f"{name}={value}" for name, value in IDLE.items()]).notes
    assert [note.split(": ")[0] for note in notes] == list(IDLE) and all("has no effect: " in note for note in notes)
    assert load_config(path).notes == ()
    off = ["policy.sequence_packing.enabled=false", "policy.train_micro_batch_size=4", "data.val_data_paths=v.jsonl"]
    assert load_config(path, [*off, "dpo.val_at_end=true"]).notes == ()
