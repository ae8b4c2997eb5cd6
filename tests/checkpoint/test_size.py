"""Bytes of a checkpoint by arithmetic, against those of a real one."""

from __future__ import annotations

import pytest

from megadpo.checkpoint.size import checkpoint_bytes
from megadpo.config.load import load_config
from megadpo.families import read_architecture
from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import DIST
from tests.helpers.runs import make_config, make_model, train


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [DIST],
        ["policy.precision=bfloat16", DIST],
        ["policy.precision=bfloat16", "policy.freeze=['model.layers.{0..1}.*']"],
    ],
)
def test_a_real_checkpoint_is_as_large_as_planned(tmp_path, overrides):
    """Its files, within 2%: headers, schedule and metadata come on top."""
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    path = make_config(tmp_path, model, dpo={"max_num_steps": 1}, checkpointing={"enabled": True, "save_period": 1})
    overrides = [*overrides, "policy.device=cpu"]
    assert run_distributed(train, 1, str(path), overrides, init_process_group=False) == [0]
    (step,) = (tmp_path / "checkpoints").glob("step_*")
    written = sum(file.stat().st_size for file in (step / "model").rglob("*.distcp"))
    cfg = load_config(str(path), overrides)
    planned = checkpoint_bytes(read_architecture(model), cfg)
    assert planned.with_optimizer == pytest.approx(written, rel=0.02)
    exported = (model / "model.safetensors").stat().st_size
    width = {"bfloat16": 0.5, "float32": 1.0}[cfg.policy.precision]
    assert planned.weights == pytest.approx(exported * width, rel=0.02)
