"""What may not change between a run and its resume is refused, what may is said, and two runs don't share a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from megadpo.checkpoint.folder import complete_checkpoints, delete, finish_deletions, require_info, step_folders
from megadpo.config.problems import ConfigError, SaveError
from megadpo.model.manifest import write_manifest
from megadpo.model.source import ModelSource, weights_fingerprint
from megadpo.train.resume import claim, require_owner
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, ranked_pairs, read_metrics, train_and_read


def other_model(model: Path, folder: Path) -> Path:
    """The same but for one matrix."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.distributed
def test_another_reference_is_refused_and_other_settings_are_said(tmp_path):
    model = make_model(tmp_path / "model")
    other = other_model(model, tmp_path / "other")
    config = make_config(tmp_path, model, checkpointing={"enabled": True, "save_period": 2})

    def go(*overrides: str) -> tuple[int, str]:
        [outcome] = run_distributed(train_and_read, 1, str(config), list(overrides), init_process_group=False)
        return outcome

    assert go("dpo.max_num_steps=1")[0] == 0
    moved = f"policy.model_name={shutil.move(model, tmp_path / 'moved')}"
    sft = ["dpo.reference.mode=none", "dpo.preference_loss_weight=0", "dpo.sft_loss_weight=1"]
    for field, overrides in (
        ("policy.model_name", [f"policy.model_name={other}"]),
        ("dpo.reference.model_name", [moved, f"dpo.reference.model_name={other}"]),
        ("dpo.reference.mode", [moved, *sft]),
    ):
        code, printed = go(*overrides)
        assert code == 2 and f"{field}: got" in printed and "step_1 was trained" in printed
    code, printed = go(moved, "dpo.reference_policy_kl_penalty=0.2", "dpo.max_num_steps=1", "dpo.val_period=3")
    assert code == 0 and "dpo.reference_policy_kl_penalty 0.2, which was 0.1" in printed
    assert printed.count("changed since step_1") == 1 and "nothing to do" in printed


@pytest.mark.distributed
def test_an_epoch_goes_on_in_its_order(tmp_path):
    """Of prompts with all of their pairs; without prompts in common that is the order of pairs."""
    model = make_model(tmp_path / "model")
    ranked = str(ranked_pairs(tmp_path / "ranked.jsonl", prompts=14, answers=3, seed=0))

    def go(name: str, *overrides: str) -> tuple[int, str]:
        saving = ["checkpointing.enabled=true", f"checkpointing.checkpoint_dir={tmp_path / name}"]
        arguments = [*saving, f"logger.log_dir={tmp_path / name}", *overrides]
        [outcome] = run_distributed(train_and_read, 1, str(config), arguments, init_process_group=False)
        return outcome

    config = make_config(tmp_path, model, data={"train_data_path": ranked})
    assert go("grouped", "dpo.max_num_steps=2")[0] == 0
    code, printed = go("grouped", "data.group_prompts=false")
    assert code == 2 and "order of an epoch: got 'pairs'; expected prompts, as in" in printed, printed
    checkpoint = tmp_path / "grouped/step_2"
    record = json.loads((checkpoint / "megadpo.json").read_text())
    del record["position"]["data_settings"]["order of an epoch"]
    (checkpoint / "megadpo.json").write_text(json.dumps(record))  # as before there was such a setting
    write_manifest(checkpoint)
    code, printed = go("grouped", "data.group_prompts=false")
    assert code == 0, printed

    config = make_config(tmp_path, model)
    assert go("whole")[0] == go("cut", "dpo.max_num_steps=2")[0] == 0
    code, printed = go("cut", "data.group_prompts=false")
    assert code == 0, printed
    mine, theirs = (read_metrics(tmp_path / name)[-1] for name in ("cut", "whole"))
    assert mine["step"] == 3 and mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)


def test_fingerprints_tell_models_of_one_shape_apart(tmp_path):
    model = make_model(tmp_path / "model")
    other, copy = other_model(model, tmp_path / "other"), shutil.copytree(model, tmp_path / "copy")
    one, two, three = (weights_fingerprint(ModelSource(folder, None)) for folder in (model, other, copy))
    assert one == three != two


def test_a_fingerprint_of_every_tensor_sees_the_smallest_one(tmp_path):
    """A norm among megabytes, as a run with everything else frozen changes it; in both kinds of folder."""
    folders = [tmp_path / name for name in ("one", "other")]
    for number, folder in enumerate(folders):
        (folder / "model").mkdir(parents=True)
        tensors = {f"layers.{i}": torch.zeros(90_001 + i) for i in range(10)} | {"layers.3.norm": torch.ones(5)}
        tensors["layers.3.norm"] += number
        save_file(tensors, folder / "model.safetensors")
        dcp.save(tensors, checkpoint_id=folder / "model", no_dist=True)
    for kind in (None, "megatron"):
        sources = [ModelSource(folder, folder if kind else None) for folder in folders]
        one, other = (weights_fingerprint(source, every_tensor=True) for source in sources)
        assert one != other
        again = weights_fingerprint(sources[0], every_tensor=True)
        assert one == again
        assert len({weights_fingerprint(source) for source in sources}) == 1, "as the samples of a whole file miss it"


def resume_in_two_folders(first: str, second: str) -> str:
    """Each rank given a folder of its own, as nodes without a shared file system have."""
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device
    from megadpo.train import resume

    resume.SEEN_WITHIN_S = 0.5
    parallel = initialize(Grid(), setup_device("cpu"))
    try:
        resume.require_shared(Path((first, second)[dist.get_rank()]), parallel)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_a_folder_that_is_not_shared_is_refused_by_every_rank(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert run_distributed(resume_in_two_folders, 2, a, a, init_process_group=False) == ["", ""]
    assert not list(Path(a).iterdir())
    for message in run_distributed(resume_in_two_folders, 2, a, b, init_process_group=False):
        assert "does not see what rank 0 writes" in message and "shared file system" in message


def test_the_run_that_started_last_owns_the_folder(tmp_path):
    first = claim(tmp_path)
    require_owner(tmp_path, first)
    second = claim(tmp_path)
    require_owner(tmp_path, second)
    with pytest.raises(SaveError, match="another run has started"):
        require_owner(tmp_path, first)


def test_a_folder_that_is_no_checkpoint_of_a_run_is_named(tmp_path):
    (tmp_path / "step_0").mkdir()
    (tmp_path / "step_0/megadpo.json").write_text(json.dumps({"format": 1, "dtype": "float32", "step": 0}))
    with pytest.raises(ConfigError, match=r"step_0/megadpo.json"):
        require_info(step_folders(tmp_path)[-1])
    assert complete_checkpoints(tmp_path) == []


def test_what_is_deleted_is_never_there_in_part(tmp_path, monkeypatch):
    (tmp_path / "step_3/model").mkdir(parents=True)
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)  # killed before it got far
    delete(tmp_path / "step_3")
    assert not (tmp_path / "step_3").exists()
    monkeypatch.undo()
    (tmp_path / "step_4").mkdir()
    delete(tmp_path / "step_4")
    finish_deletions(tmp_path)
    assert not list(tmp_path.iterdir())
