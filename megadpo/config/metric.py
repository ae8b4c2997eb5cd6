"""The metrics of the objective. Parses `checkpointing.metric_name` and `checkpoint_must_save_by`."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from megadpo.config.problems import ConfigError, Problem

_FIELD = "checkpointing.metric_name"


class Metric(NamedTuple):
    """A metric of megadpo/objective/dpo.py: a mean over pairs."""

    higher_is_better: bool | None
    """None: neither is better."""
    needs_rewards: bool = False
    """It is not measured if the loss needs a reference and there is none."""


METRICS: dict[str, Metric] = {
    "loss": Metric(False),
    "sft_loss": Metric(False),
    "logps/chosen": Metric(None),
    "logps/rejected": Metric(None),
    "preference_loss": Metric(False, needs_rewards=True),
    "rewards/chosen": Metric(None, needs_rewards=True),
    "rewards/rejected": Metric(None, needs_rewards=True),
    "rewards/margins": Metric(True, needs_rewards=True),
    "rewards/accuracies": Metric(True, needs_rewards=True),
}
# NeMo RL's names: rewards_chosen, rewards_chosen_mean, accuracy, ...
_ALIASES = {"accuracy": "rewards/accuracies"} | {
    name.replace("/", "_") + end: name for name in METRICS for end in ("", "_mean") if "/" in name
}


class MetricName(NamedTuple):
    """A logged metric: `prefix`/`metric`."""

    prefix: str
    """train or validation-<name>."""
    metric: str
    """One of METRICS."""

    @property
    def key(self) -> str:
        """The key in metrics.jsonl, e.g. validation-default/loss."""
        return f"{self.prefix}/{self.metric}"


def parse_metric_name(text: str, val_names: Collection[str]) -> MetricName:
    """Parses a metric name. `val_names`: the names of all validation sets.

    Forms: `validation-<name>_<metric>` or `validation-<name>/<metric>`, with or without NeMo RL's `val:` before it, and
    `train:<metric>`, `train_<metric>` or `train/<metric>`. Metrics: METRICS and NeMo RL's names for the same.
    Raises ConfigError.
    """
    rest = text.strip()
    if rest.startswith("val:"):
        rest = rest[len("val:") :]
    elif rest.startswith("train:"):
        rest = "train/" + rest[len("train:") :]
    # Longest name first, because one set's name may begin with another's.
    prefixes = ["train"] + [f"validation-{name}" for name in sorted(val_names, key=len, reverse=True)]
    for prefix in prefixes:
        if rest.startswith(prefix) and rest[len(prefix) : len(prefix) + 1] in ("_", "/"):
            metric = rest[len(prefix) + 1 :]
            metric = _ALIASES.get(metric, metric)
            if metric in METRICS:
                return MetricName(prefix, metric)
            expected = "a metric among " + ", ".join(METRICS)
            raise ConfigError(Problem(_FIELD, text, expected, f"for example {prefix}_loss"))
    sets = ", ".join(val_names) if val_names else "none: data.val_data_paths is null"
    example = f"validation-{next(iter(val_names))}_loss" if val_names else "train:loss"
    expected = f"validation-<name>_<metric> or train:<metric>, null for none (validation sets: {sets})"
    raise ConfigError(Problem(_FIELD, text, expected, f"for example {example}"))


def parse_duration_s(text: str) -> int:
    """Seconds of a `DD:HH:MM:SS` duration. Raises ValueError."""
    found = re.fullmatch(r"(\d+):([01]?\d|2[0-3]):([0-5]?\d):([0-5]?\d)", text.strip())
    if found is None:
        raise ValueError(f"not DD:HH:MM:SS: {text!r}")
    days, hours, minutes, seconds = (int(part) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
