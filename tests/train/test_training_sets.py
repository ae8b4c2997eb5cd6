"""Whole runs on several training sets, with pairs held out and with the rest of an epoch; a mixture resumes where it was."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import evaluate, make_config, make_model, make_pairs, read_metrics, train, train_and_read

SAVING = {"enabled": True, "save_period": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def configured(folder: Path, model: Path) -> Path:
    folder.mkdir()
    sets = {str(make_pairs(folder / f"{name}.jsonl", count, seed=seed)): weight for name, count, seed, weight in (
        ("a", 12, 3, 3.0), ("b", 30, 4, 1.0)
    )}  # fmt: skip
    data = {"train_data_path": sets, "holdout": 0.1, "val_data_paths": None}
    return make_config(folder, model, checkpointing=SAVING, data=data, dpo={"val_at_end": True})


def go(config: Path, *overrides: str) -> str:
    ((code, printed),) = run_distributed(train_and_read, 1, str(config), list(overrides), init_process_group=False)
    assert code == 0, printed
    return printed


@pytest.mark.distributed
def test_a_mixture_resumes_bit_for_bit_and_not_with_other_weights(model: Path, tmp_path: Path) -> None:
    whole, parts = configured(tmp_path / "whole", model), configured(tmp_path / "parts", model)
    printed = go(whole, "dpo.max_num_epochs=2", "dpo.max_num_steps=8")
    assert "24 pairs of each epoch (75.0%)" in printed, printed
    assert re.search(r", 4 of 4\d prompts", printed), printed
    for steps in (5, 8):
        go(parts, "dpo.max_num_epochs=2", f"dpo.max_num_steps={steps}")
    runs = [read_metrics(config.parent / "logs") for config in (whole, parts)]
    losses = [{r["step"]: float(r["train/loss"]).hex() for r in run if "train/loss" in r} for run in runs]
    assert losses[0] == losses[1] and list(losses[0]) == list(range(1, 9))
    assert any("validation-holdout/loss" in record for record in runs[0])
    paths = [str(parts.parent / f"{name}.jsonl") for name in "ab"]
    weights = f"data.train_data_path={{{paths[0]}: 1, {paths[1]}: 1}}"
    overrides = [weights, "dpo.max_num_epochs=3", "dpo.max_num_steps=10"]
    ((code, printed),) = run_distributed(train_and_read, 1, str(parts), overrides, init_process_group=False)
    assert code == 2 and "data.train_data_path weights" in printed


@pytest.mark.distributed
def test_pairs_held_out_rank_checkpoints_and_are_evaluated(model: Path, tmp_path: Path) -> None:
    config = configured(tmp_path / "run", model)
    ranked = [
        "checkpointing.metric_name=validation-holdout_loss",
        "dpo.val_period=2",
        "dpo.max_num_steps=4",
        "dpo.val_batches=0",
    ]
    assert go(config, *ranked).endswith("FOLDER; --best: by validation-holdout/loss")
    trained = read_metrics(config.parent / "logs")[-1]["validation-holdout/loss"]
    models = [f"policy.model_name={config.parent}/checkpoints/step_4", f"dpo.reference.model_name={model}"]
    assert run_distributed(evaluate, 1, str(config), models, init_process_group=False) == [0]
    evaluated = json.loads((config.parent / "logs/evaluation.json").read_text())
    assert evaluated["validation-holdout/loss"] == pytest.approx(trained, rel=1e-5)


def test_the_rest_of_an_epoch_is_a_smaller_batch(model: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, model, pairs=19, dpo={"max_num_steps": 6, "max_num_epochs": 2})
    codes = run_distributed(train, 2, str(config), ["data.drop_last=false"], init_process_group=False)
    assert codes == [0, 0]
    pairs = [record["train/num_pairs"] for record in read_metrics(tmp_path / "logs") if "train/num_pairs" in record]
    assert pairs == [8, 8, 3, 8, 8, 3]
