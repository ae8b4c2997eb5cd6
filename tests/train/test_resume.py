"""Truth 4: stopped and resumed in the same layout the losses are the same bits; in another, the same to 1e-5.
Truth 5 from the training side: a checkpoint written by several ranks exports to what transformers opens."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import CP2, DIST, PP2, SP, TP2, VPP2
from tests.helpers.runs import make_config, make_model, make_pairs, read_metrics, train

BF16 = "policy.precision=bfloat16"
SAVING = {"enabled": True, "save_period": 2}
CASES = {
    "one": (1, []),
    "one_bf16": (1, [BF16, DIST]),
    "tp2_sp_pp2": (4, [TP2, SP, PP2]),
    "dp2": (2, []),
    "dp2_distributed_optimizer": (2, [DIST]),
    "pp2_bf16_distributed_optimizer": (2, [PP2, BF16, DIST]),
    "pp2_vpp2": (2, [PP2, VPP2]),
    "cp2_distributed_optimizer": (2, [CP2, DIST]),
    "dp2_pp2_vpp2_bf16_distributed_optimizer": (4, [PP2, VPP2, BF16, DIST]),
}
NAMES = ("train/loss", "train/grad_norm", "train/rewards/margins", "train/lr")
COSINE = {"megatron_cfg": {"scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 2, "lr_decay_iters": 8}}}


def bits(folder, steps):
    return {r["step"]: [float(r[n]).hex() for n in NAMES] for r in read_metrics(folder / "logs") if r["step"] in steps}


def go(config, world_size, overrides, steps):
    overrides = [*overrides, f"dpo.max_num_steps={steps}", "dpo.max_num_epochs=2"]
    codes = run_distributed(train, world_size, str(config), overrides, init_process_group=False)
    assert codes == [0] * world_size


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_resume_is_bit_for_bit(name, model, tmp_path):
    world_size, overrides = CASES[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        make_config(folder, model, policy=COSINE, checkpointing=SAVING)
    go(whole / "config.yaml", world_size, overrides, 7)
    go(parts / "config.yaml", world_size, overrides, 4)  # 5 steps an epoch: the resumed run crosses into the second
    go(parts / "config.yaml", world_size, overrides, 7)
    assert bits(parts, range(1, 8)) == bits(whole, range(1, 8))
    assert len(bits(whole, range(1, 8))) == 7


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stages",
    [
        [(2, [DIST, TP2, SP]), (2, [DIST, PP2]), (2, [DIST])],
        [(2, [DIST, PP2, VPP2]), (2, [DIST, TP2]), (2, [DIST, PP2, VPP2])],
        [(2, [PP2, VPP2]), (1, []), (2, [PP2, VPP2])],
        [(2, [DIST, CP2]), (2, [DIST, TP2]), (4, [DIST, CP2, PP2])],
        [(2, [CP2]), (1, []), (2, [CP2])],
    ],
    ids=[
        "distributed_optimizer",
        "virtual_pipeline_distributed_optimizer",
        "virtual_pipeline",
        "context_distributed_optimizer",
        "context",
    ],
)
def test_resume_in_another_layout(stages, model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        make_config(folder, model, policy=COSINE, checkpointing=SAVING)
    go(whole / "config.yaml", 1, [], 6)
    for steps, (world_size, overrides) in zip((2, 4, 6), stages, strict=True):
        go(parts / "config.yaml", world_size, overrides, steps)
    got, want = read_metrics(parts / "logs"), read_metrics(whole / "logs")
    for mine, theirs in zip(got, want, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)


@pytest.mark.distributed
def test_resume_on_other_data_is_refused(model, tmp_path, capfd):
    config = make_config(tmp_path, model, checkpointing=SAVING)
    go(config, 1, [], 2)
    make_pairs(tmp_path / "train.jsonl", 40, seed=9)
    codes = run_distributed(train, 1, str(config), ["dpo.seed=7"], init_process_group=False)
    assert codes == [2]
    assert (tmp_path / "checkpoints/step_2/megadpo.json").is_file()


@pytest.mark.distributed
def test_checkpoint_of_several_ranks_exports_to_hugging_face(model, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megadpo.model.weights.convert import export_hf

    config = make_config(tmp_path, model, checkpointing=SAVING)
    go(config, 4, [TP2, SP, PP2, VPP2], 2)
    export_hf(tmp_path / "checkpoints/step_2", tmp_path / "exported")
    trained, start = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "exported", model))
    assert trained.keys() == start.keys()
    moved = [name for name in start if not torch.equal(start[name], trained[name])]
    assert len(moved) > len(start) / 2
    for name in start:
        assert (start[name] - trained[name]).abs().max() < 0.05  # two steps of at most lr each, not scrambled
    AutoTokenizer.from_pretrained(tmp_path / "exported")
    # and as the start of another run, straight from the Megatron folder
    again = tmp_path / "again"
    again.mkdir()
    from_export = make_config(again, tmp_path / "exported")
    go(from_export, 1, [], 1)
    first = read_metrics(again / "logs")[0]
    (again / "logs/metrics.jsonl").unlink()
    go(from_export, 2, [f"policy.model_name={tmp_path / 'checkpoints/step_2'}", TP2], 1)
    assert read_metrics(again / "logs")[0]["train/logps/chosen"] == pytest.approx(first["train/logps/chosen"], rel=1e-5)


def test_keep_top_k_keeps_the_best_and_the_newest(tmp_path):
    from megadpo.checkpoint.folder import complete_checkpoints, prune_checkpoints

    for step, loss in ((1, 0.5), (2, 0.3), (3, float("nan")), (4, 0.4), (5, 0.9)):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        position = {"step": step, "epoch": 0, "batch": step, "metrics": {"validation-a/loss": loss}}
        record = {"format": 1, "world_size": 1, "layout": "", "has_optimizer": True, "optimizer_format": ""}
        (folder / "megadpo.json").write_text(json.dumps({**record, "position": position}))
    (tmp_path / ".step_6.partial").mkdir()
    prune_checkpoints(tmp_path, keep_top_k=2, metric="validation-a/loss", higher_is_better=False)
    assert [info.position.step for info in complete_checkpoints(tmp_path)] == [2, 4, 5]
    prune_checkpoints(tmp_path, keep_top_k=1, metric=None, higher_is_better=False)
    assert [info.position.step for info in complete_checkpoints(tmp_path)] == [5]


@pytest.mark.distributed
def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(model, tmp_path):
    """A CPU refuses the state of a GPU's generator, which is 16 bytes long."""
    config = make_config(tmp_path, model, checkpointing=SAVING)
    go(config, 1, [], 2)
    file = tmp_path / "checkpoints" / "step_2" / "rng" / "rank_0.pt"
    state = torch.load(file, weights_only=False)
    assert state["device"] == "cpu"
    torch.save({**state, "device": "cuda", "cuda": torch.zeros(16, dtype=torch.uint8)}, file)
    go(config, 1, [], 3)
    assert len(bits(tmp_path, range(1, 4))) == 3
