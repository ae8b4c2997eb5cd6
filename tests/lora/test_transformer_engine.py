"""Adapters beside Transformer Engine's layers, by stand-ins: norm and linear in one, and experts in one kernel."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import DIST
from tests.helpers.runs import make_config, make_model, read_metrics
from tests.model.layers.test_transformer_engine import MEG, train_with


@pytest.mark.distributed
@pytest.mark.parametrize(("case", "peft"), [("qwen3", "{enabled: true, dim: 4}"),
                                            ("qwen2_moe", "{enabled: true, dim: 4, target_modules: [all-linear]}")])  # fmt: skip
def test_a_run_is_that_of_the_local_layers(case, peft, tmp_path):
    model = make_model(tmp_path / "model", case)
    overrides = [f"{MEG}.bias_activation_fusion=false", f"{MEG}.apply_rope_fusion=false", f"{MEG}.peft={peft}", DIST]
    steps = []
    for implementation in ("local", "stand_ins"):
        folder = tmp_path / implementation
        folder.mkdir()
        config = str(make_config(folder, model))
        assert run_distributed(train_with, 1, implementation, config, overrides, init_process_group=False) == [0]
        steps.append(read_metrics(folder / "logs"))
    for mine, theirs in zip(*steps, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
    assert steps[0][-1]["train/rewards/margins"] != 0
