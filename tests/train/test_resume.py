"""Truth 4: stopped and resumed in the same layout the losses are the same bits; in another, the same to 1e-5.
Truth 5 from the training side: a checkpoint written by several ranks exports to what transformers opens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megadpo.checkpoint.folder import complete_checkpoints, prune_checkpoints, require_info, step_folders
from megadpo.config.problems import ConfigError
from megadpo.model.manifest import write_manifest
from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import CP2, DIST, PP2, SP, TP2, VPP2
from tests.helpers.runs import make_config, make_model, make_pairs, ranked_pairs, read_metrics, train, train_and_read

BF16 = "policy.precision=bfloat16"
SAVING = {"enabled": True, "save_period": 2}
CASES = {
    "one_bf16": (1, [BF16, DIST]),
    "tp2_sp_pp2": (4, [TP2, SP, PP2]),
    "tp2_async": (2, [TP2, "checkpointing.async_save=true"]),
    "dp2": (2, []),
    "dp2_distributed_optimizer": (2, [DIST]),
    "cp2_distributed_optimizer": (2, [CP2, DIST]),
    "dp2_pp2_vpp2_bf16_distributed_optimizer": (4, [PP2, VPP2, BF16, DIST]),
}
PARTS = {"one": (1, []), "pp2_bf16_distributed_optimizer": (2, [PP2, BF16, DIST]), "pp2_vpp2": (2, [PP2, VPP2])}
"""Of those above: which one it is, where one of them fails."""
GROUPED = ("dp2", "cp2_distributed_optimizer")
"""Cases whose pairs have prompts in common, and answers that begin alike."""
METRIC = "validation-a/loss"
NAMES = ("train/loss", "train/grad_norm", "train/rewards/margins", "train/lr")
COSINE = {
    "max_total_sequence_length": 128,
    "megatron_cfg": {"scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 2, "lr_decay_iters": 8}},
}


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
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in PARTS)])
def test_resume_is_bit_for_bit(name, model, tmp_path):
    world_size, overrides = {**CASES, **PARTS}[name]
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    for folder in (whole, rest):
        folder.mkdir()
        data = {}
        if name in GROUPED:
            pairs = ranked_pairs(folder / "ranked.jsonl", prompts=14, answers=3, seed=0, begin=16)
            data = {"train_data_path": str(pairs)}
        make_config(folder, model, policy=COSINE, checkpointing={"enabled": True, "save_period": 4}, data=data)
    go(whole / "config.yaml", world_size, overrides, 7)
    shutil.copytree(whole / "checkpoints", rest / "checkpoints", ignore=shutil.ignore_patterns("step_7"))
    go(rest / "config.yaml", world_size, overrides, 7)  # from step 4; 5 steps an epoch: it crosses into the second
    assert bits(rest, range(1, 8)) == bits(whole, range(5, 8))
    assert len(bits(rest, range(1, 8))) == 3


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    """Six steps without a break."""
    folder = tmp_path_factory.mktemp("one_process")
    go(make_config(folder, model, policy=COSINE), 1, [], 6)
    return read_metrics(folder / "logs")


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
def test_resume_in_another_layout(stages, model, one_process, tmp_path):
    config = make_config(tmp_path, model, policy=COSINE, checkpointing=SAVING)
    for steps, (world_size, overrides) in zip((2, 4, 6), stages, strict=True):
        go(config, world_size, overrides, steps)
    for mine, theirs in zip(read_metrics(tmp_path / "logs"), one_process, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)


@pytest.mark.distributed
def test_resume_on_other_data_is_refused(model, tmp_path):
    config = make_config(tmp_path, model, checkpointing=SAVING)
    go(config, 1, [], 2)
    make_pairs(tmp_path / "train.jsonl", 40, seed=9)
    [(code, printed)] = run_distributed(train_and_read, 1, str(config), ["dpo.seed=7"], init_process_group=False)
    assert code == 2 and "data.train_data_path: got" in printed and "dpo.seed: got 7" in printed
    assert (tmp_path / "checkpoints/step_2/megadpo.json").is_file()


def resume_without_building(config: str, overrides: list[str]) -> tuple[int, str]:
    """Target for run_distributed: as `train_and_read`, in a run that builds no model."""
    from megadpo.train import setup

    def build_policy(*_, **__):
        raise AssertionError("a model is built")

    setup.build_policy = build_policy
    return train_and_read(config, overrides)


@pytest.mark.distributed
def test_a_checkpoint_without_optimizer_state_is_refused_before_the_model_is_built(model, tmp_path):
    config = make_config(tmp_path, model, checkpointing={**SAVING, "save_optimizer": False}, dpo={"max_num_steps": 1})
    [(code, printed)] = run_distributed(train_and_read, 1, str(config), [], init_process_group=False)
    assert code == 0 and "save_optimizer: false: if this run is stopped, it can't be resumed" in printed
    more = ["dpo.max_num_steps=2"]
    [(code, printed)] = run_distributed(resume_without_building, 1, str(config), more, init_process_group=False)
    assert code == 2 and "step_1'; expected a checkpoint with optimizer state" in printed, printed


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


def make_records(folder, losses, **changes):
    """Checkpoints as `prune_checkpoints` sees them: step -> loss, {} for none."""
    for step, loss in losses.items():
        (folder / f"step_{step}").mkdir()
        position = {"step": step, "epoch": 0, "batch": step, "metrics": loss if loss == {} else {METRIC: loss}}
        record = {"format": 1, "world_size": 1, "layout": "", "has_optimizer": True, "optimizer_format": "", **changes}
        (folder / f"step_{step}/megadpo.json").write_text(json.dumps({**record, "position": position}))


@pytest.mark.parametrize(
    ("keep_top_k", "metric", "higher_is_better", "left"),
    [
        (2, METRIC, False, [2, 8, 10]),
        (2, METRIC, True, [7, 9, 10]),  # of 7 and 1, which are as good, the newer
        (5, METRIC, True, [1, 2, 7, 8, 9, 10]),  # none, null and NaN are the worst either way
        (7, METRIC, False, [1, 2, 6, 7, 8, 9, 10]),
        (2, None, False, [9, 10]),
        (9, None, False, [1, 2, 3, 4, 6, 7, 8, 9, 10]),
        (None, None, False, [1, 2, 3, 4, 6, 7, 8, 9, 10]),
    ],
)
def test_keep_top_k_keeps_the_best_and_the_newest(keep_top_k, metric, higher_is_better, left, tmp_path):
    nan = float("nan")
    losses = {1: 0.6, 2: 0.3, 3: {}, 4: None, 6: nan, 7: 0.6, 8: 0.4, 9: 0.9, 10: nan}
    make_records(tmp_path, losses)
    (tmp_path / ".step_11.partial").mkdir()
    (tmp_path / "step_12").mkdir()
    (tmp_path / "step_13_mine").mkdir()
    (tmp_path / "step_13_mine/megadpo.json").write_text("{}")
    gone = prune_checkpoints(tmp_path, keep_top_k=keep_top_k, metric=metric, higher_is_better=higher_is_better)
    assert [info.position.step for info in complete_checkpoints(tmp_path)] == left
    assert gone == [tmp_path / f"step_{step}" for step in losses if step not in left]
    assert step_folders(tmp_path)[-1] == tmp_path / "step_10"


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    assert step_folders(tmp_path) == []
    make_records(tmp_path, {3: 0.5}, format=2)
    with pytest.raises(ConfigError, match="format 2, this version reads 1"):
        require_info(tmp_path / "step_3")


@pytest.mark.distributed
def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(model, tmp_path):
    """A CPU refuses the state of a GPU's generator, which is 16 bytes long."""
    config = make_config(tmp_path, model, checkpointing=SAVING)
    go(config, 1, [], 2)
    file = tmp_path / "checkpoints" / "step_2" / "rng" / "rank_0.pt"
    state = torch.load(file, weights_only=False)
    assert state["device"] == "cpu"
    torch.save({**state, "device": "cuda", "cuda": torch.zeros(16, dtype=torch.uint8)}, file)
    write_manifest(tmp_path / "checkpoints" / "step_2")
    go(config, 1, [], 3)
    assert len(bits(tmp_path, range(1, 4))) == 3
