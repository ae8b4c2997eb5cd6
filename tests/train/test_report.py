"""What a run says at its end: what was saved and how to export it; and of a folder that an earlier run has used."""

from __future__ import annotations

import pytest

from megadpo.commands import main
from megadpo.config import load_config
from megadpo.train.report import closing_words
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, train_and_read


def said(config, *overrides):
    ((code, printed),) = run_distributed(train_and_read, 1, str(config), list(overrides), init_process_group=False)
    assert code == 0, printed
    return printed


@pytest.mark.distributed
def test_a_run_from_its_end_to_its_export(tmp_path):
    folder = tmp_path / "checkpoints"
    saving = {"enabled": True, "save_period": 1, "metric_name": "validation-held_out_loss"}
    config = make_config(
        tmp_path,
        make_model(tmp_path / "model"),
        dpo={"max_num_steps": 2, "val_period": 1},
        policy={"megatron_cfg": {"optimizer": {"use_distributed_optimizer": True}}},
        checkpointing=saving,
    )
    export = f"export step_2: megadpo export {folder} FOLDER; --best: by validation-held_out/loss"
    first = said(config)
    assert f"finished: 2 steps; metrics in {tmp_path}/logs checkpoints in {folder}: step_1, step_2 {export}" in first
    assert first.endswith("by validation-held_out/loss") and "held steps" not in first

    again = said(config)
    assert again.startswith("nothing to do: this run had finished, with step 2; raise dpo.max_num_steps")
    assert again.endswith(export) and "Warning" not in first + again

    weights_only = ["checkpointing.save_optimizer=false", f"checkpointing.checkpoint_dir={folder}_of_weights"]
    assert "held steps of another run" in said(config, *weights_only)
    assert "step 2; name another checkpointing.checkpoint_dir to begin anew" in said(config, *weights_only)

    anew = said(config, "checkpointing.enabled=false")
    assert f"logger.log_dir held steps of another run: they are in {tmp_path}/logs/metrics.superseded-" in anew
    assert anew.endswith("checkpointing.enabled is false: nothing was saved")

    assert main(["export", str(folder), str(tmp_path / "trained"), "--best"]) == 0
    assert (tmp_path / "trained/model.safetensors").is_file()


def test_a_run_whose_checkpoints_were_taken_away(tmp_path):
    cfg = load_config(make_config(tmp_path, tmp_path / "model", checkpointing={"enabled": True}))
    assert closing_words(cfg, 3)[-1] == f"no complete checkpoint in {tmp_path}/checkpoints"
