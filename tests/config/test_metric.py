"""checkpointing.metric_name and checkpoint_must_save_by."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError, parse_duration_s, parse_metric_name

SETS = ["default", "my", "my_set"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("validation-default_loss", "validation-default/loss"),
        ("val:validation-default_loss", "validation-default/loss"),
        ("validation-default/loss", "validation-default/loss"),
        ("validation-my_loss", "validation-my/loss"),
        ("validation-my_set_sft_loss", "validation-my_set/sft_loss"),
        ("validation-my_set_accuracy", "validation-my_set/rewards/accuracies"),
        ("val:validation-default_rewards/margins", "validation-default/rewards/margins"),
        ("validation-default_rewards_chosen_mean", "validation-default/rewards/chosen"),
        ("train:loss", "train/loss"),
        (" train:loss\n", "train/loss"),
        ("train_loss", "train/loss"),
        ("train/preference_loss", "train/preference_loss"),
        ("train:rewards/accuracies", "train/rewards/accuracies"),
    ],
)
def test_metric_name(text, key):
    metric = parse_metric_name(text, SETS)
    assert metric.key == key
    assert (metric.prefix, metric.metric) == tuple(key.split("/", 1))


@pytest.mark.parametrize(
    "text", ["", "loss", "val_loss", "val:loss", "validation-gone_loss", "train:bleu", "training_loss", "trian_loss"]
)
def test_metric_name_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_metric_name(text, SETS)
    (problem,) = caught.value.problems
    assert problem.where == "checkpointing.metric_name" and problem.value == text
    assert problem.expected.startswith("a metric among") == (text == "train:bleu")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("00:00:00:01", 1), ("00:03:45:00", 13500), ("1:0:0:0", 86400), (" 00:00:01:00 ", 60), ("10:23:59:59", 950399)],
)
def test_duration(text, seconds):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "03:45:00", "00:24:00:00", "00:00:60:00", "00:00:00:60", "-1:00:00:00", "a:b:c:d"]
)
def test_duration_refused(text):
    with pytest.raises(ValueError, match="DD:HH:MM:SS"):
        parse_duration_s(text)
