"""docs/metrics.md names what a run and an evaluation log, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from megadpo.checkpoint import TrainingPosition
from megadpo.config.schema import DpoConfig
from megadpo.data.batches.loader import GlobalBatch
from megadpo.objective.dpo import metric_names
from megadpo.train.evaluation import metrics_of
from megadpo.train.loop import step_record
from megadpo.train.step import CONTEXT_IMBALANCE, StepOutcome
from megadpo.train.watch import GPU_NUMBERS, PEAK

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_every_name_of_a_step_is_on_the_page_and_no_other() -> None:
    objective = metric_names(DpoConfig(), has_reference=True)
    outcome = StepOutcome(dict.fromkeys([*objective, CONTEXT_IMBALANCE], 0.0), grad_norm=0.0, lr=0.0, updated=True)
    batch = GlobalBatch(micro_batches=[], num_pairs=1, num_tokens=1, pair_indices=[0])
    before = TrainingPosition(step=0, epoch=0, batch=0, data_fingerprint="", data_settings={})
    logged = {"step", *step_record(batch, outcome, before, seconds=1.0)}
    logged |= {PEAK, *(f"machine/gpu_<n>_{name}" for name in GPU_NUMBERS)}
    logged |= {"train/moe_aux_loss", "train/moe_aux_loss_layer_<n>"}  # model/moe_balance.py's, of models with experts
    steps = PAGE[: PAGE.index("## Steps with a validation")]
    rows = "".join(line.split("|")[1] for line in steps.splitlines() if line.startswith("| `"))
    assert set(re.findall("`(.+?)`", rows)) == logged


def test_every_name_of_an_evaluation_is_on_the_page() -> None:
    names = set(metrics_of({}, [], has_preference_loss=True))
    assert {f"validation-<name>/{name}" for name in names} == set(re.findall(r"\| `(validation-.+?)`", PAGE))
