"""Frozen weights stay as they were, bit for bit; the others move as if nothing were frozen; every layout agrees."""

from __future__ import annotations

import re

import pytest
import torch

from megadpo.families import read_architecture, weight_table
from megadpo.model.weights.hf_folder import HfWeights
from megadpo.model.weights.load import load_shard
from tests.helpers.distributed import run_distributed
from tests.helpers.equal_runs import assert_equal_runs, run
from tests.helpers.overrides import DIST, OVERLAP, PP2, RECOMPUTE, SP, TP2, VPP2
from tests.helpers.runs import make_config, make_model, read_metrics, train

EMBEDDING = "model.embed_tokens.weight"
LOWER_HALF = f'policy.freeze=[{EMBEDDING},"model.layers.{{0..1}}.*"]'
LAYOUTS = {
    "tp2_sp_recompute": (2, [TP2, SP, RECOMPUTE]),
    "pp2_distributed_optimizer": (2, [PP2, DIST]),  # nothing to train on the first stage
    "dp2_pp2_vpp2_overlap": (4, [PP2, VPP2, DIST, OVERLAP]),
}


def start_weights(folder, trained):
    """The model's weights as its files hold them, by the names of `trained`."""
    weights = HfWeights.open(folder)
    found = {}
    for entry in weight_table(read_architecture(folder)).entries:
        tensor = torch.empty(entry.full_shape)
        with weights.slices(entry.hf) as sources:
            load_shard(tensor, entry, sources)
        found[next(name for name in entry.names if name in trained)] = tensor
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama_tied")


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", model, 1, [LOWER_HALF])


@pytest.mark.distributed
@pytest.mark.parametrize("extra", [[], [RECOMPUTE, "policy.freeze=[model.embed_tokens.weight]"]])
def test_the_others_move_as_if_nothing_were_frozen(extra, tmp_path):
    """One step, unclipped: AdamW's update of a weight depends on that weight's gradient alone."""
    model = make_model(tmp_path / "model", "qwen2")
    frozen = '"*.mlp.*","model.layers.0.*",lm_head.weight'
    runs = {}
    for name, overrides in (("all", []), ("some", [f"policy.freeze=[{frozen}]", *extra])):
        overrides = ["dpo.max_num_steps=1", "policy.max_grad_norm=0", *overrides]
        runs[name] = run(tmp_path / name, model, 1, overrides).weights
    for name, start in start_weights(model, runs["all"]).items():
        whole = name.startswith(("output", "decoder.layers.0.")) or re.search("mlp.linear_fc[12].weight", name)
        is_frozen = name.startswith("embedding") if extra else bool(whole)
        torch.testing.assert_close(runs["some"][name], start if is_frozen else runs["all"][name], rtol=0, atol=0)
        assert is_frozen or not torch.equal(runs["some"][name], start)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, model, one_process, tmp_path):
    world_size, overrides = LAYOUTS[name]
    got = run(tmp_path / name, model, world_size, [LOWER_HALF, *overrides])
    assert_equal_runs(got, one_process)
    start = start_weights(model, got.weights)
    same = {name for name, weight in got.weights.items() if torch.equal(weight, start[name])}
    assert same == {n for n in start if n.startswith(("embedding", "decoder.layers.0", "decoder.layers.1"))}


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [[], [DIST]], ids=["", "distributed_optimizer"])
def test_resume(optimizer, model, tmp_path, capfd):
    """In another layout, with a stage that has nothing to train; with other frozen weights it is refused."""
    config = make_config(tmp_path, model, checkpointing={"enabled": True, "save_period": 2})
    for world_size, layout, steps in ((2, [PP2], 2), (1, [], 3)):
        overrides = [LOWER_HALF, *optimizer, *layout, f"dpo.max_num_steps={steps}"]
        codes = run_distributed(train, world_size, str(config), overrides, init_process_group=False)
        assert codes == [0] * world_size
    whole = tmp_path / "whole"
    whole.mkdir()
    make_config(whole, model)
    run_distributed(train, 1, str(whole / "config.yaml"), [LOWER_HALF, *optimizer], init_process_group=False)
    got, want = read_metrics(tmp_path / "logs"), read_metrics(whole / "logs")
    assert [r["step"] for r in got] == [1, 2, 3]
    for mine, theirs in zip(got, want, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)
    assert run_distributed(train, 1, str(config), ["dpo.max_num_steps=4", *optimizer], init_process_group=False) == [2]
