"""What data.train_data_path, val_data_paths and holdout take, and what they refuse."""

from __future__ import annotations

import pytest

from megadpo.config.load import load_config


@pytest.mark.parametrize(
    ("given", "paths", "shares"),
    [
        ("a.jsonl", ["a.jsonl"], None),
        (["a.jsonl", "b"], ["a.jsonl", "b"], None),
        ({"a.jsonl": 3, "org/name:subset@train[:9%]": "1e0"}, ["a.jsonl", "org/name:subset@train[:9%]"], (0.75, 0.25)),
        ({"a.jsonl": 0.7}, ["a.jsonl"], None),
    ],
)
def test_training_sets(given, paths, shares, config):
    data = config(data={"train_data_path": given}).data
    assert (data.train_paths, data.train_shares) == (paths, shares)


@pytest.mark.parametrize("given", ["{c: 0.5, d: 0.5}", "[c, d]", "c"])
def test_the_command_lines_sets_replace_the_files(given, write):
    path = write("c.yaml", "policy: {model_name: x}\ndata: {train_data_path: {a: 0.7, b: 0.3}}\n")
    data = load_config(path, [f"data.train_data_path={given}"]).data
    assert data.train_paths == (["c"] if given == "c" else ["c", "d"])
    assert data.train_shares == ((0.5, 0.5) if given.startswith("{") else None)


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"train_data_path": {"a": 0.0}}, "data.train_data_path.a"),
        ({"train_data_path": {"a": "much"}}, "data.train_data_path.a"),
        ({"train_data_path": ["a", 3]}, "data.train_data_path[1]"),
        ({"train_data_path": 3}, "data.train_data_path"),
        ({"train_data_path": []}, "data.train_data_path"),
        ({"train_data_path": {}}, "data.train_data_path"),
        ({"train_data_path": "a", "holdout": 1.0}, "data.holdout"),
        ({"train_data_path": "a", "holdout": 0.1, "val_data_paths": {"holdout": "b"}}, "data.val_data_paths"),
    ],
)
def test_refused(data, where, refusals):
    assert list(refusals(data=data)) == [where]


def test_holdout_is_a_validation_set(config, refusals):
    data = {"train_data_path": "a", "holdout": 0.02}
    saving = {"metric_name": "validation-holdout_loss"}
    cfg = config(data=data, checkpointing=saving, dpo={"val_batches": 3})
    assert cfg.data.val_names == ["holdout"] and cfg.notes == ()
    assert list(refusals(data={"train_data_path": "a"}, checkpointing=saving)) == ["checkpointing.metric_name"]


def test_rankings_have_no_weights(config, refusals):
    data = {"train_data_path": {"a": 1, "b": 2}}
    assert list(refusals(data=data, dpo={"loss_type": "plackett_luce"})) == ["data.train_data_path"]
    config(data={"train_data_path": ["a", "b"]}, dpo={"loss_type": "plackett_luce"})
    cut = {"train_data_path": ["a", "b"], "on_too_long": "truncate"}
    assert list(refusals(data=cut, dpo={"loss_type": "plackett_luce"})) == ["data.on_too_long"]
