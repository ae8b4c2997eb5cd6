"""Truths 1 and 2: ln 2 at the first step, and every layout gives one process's losses, metrics and gradient norms."""

from __future__ import annotations

import math

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train

MEG = "policy.megatron_cfg"
TP2, PP2 = f"{MEG}.tensor_model_parallel_size=2", f"{MEG}.pipeline_model_parallel_size=2"
VPP2 = f"{MEG}.virtual_pipeline_model_parallel_size=2"
SP, DIST = f"{MEG}.sequence_parallel=true", f"{MEG}.optimizer.use_distributed_optimizer=true"
UNSHARED, UNPACKED = "policy.sequence_packing.share_prompt=false", "policy.sequence_packing.enabled=false"
RECOMPUTE = f"{MEG}.activation_checkpointing=true"
LAYOUTS = {
    "unshared": (1, [UNSHARED]),
    "unpacked": (1, [UNPACKED]),
    "recompute": (1, [RECOMPUTE]),
    "recompute_attention": (1, [RECOMPUTE, f"{MEG}.recompute_granularity=selective"]),
    "distributed_optimizer": (1, [DIST]),
    "tp2": (2, [TP2]),
    "tp2_sp": (2, [TP2, SP]),
    "tp2_sp_recompute": (2, [TP2, SP, RECOMPUTE]),
    "pp2": (2, [PP2]),
    "pp2_uneven": (2, [PP2, f"{MEG}.num_layers_in_first_pipeline_stage=1"]),
    "pp2_unpacked": (2, [PP2, UNPACKED]),
    "dp2": (2, []),
    "dp2_distributed_optimizer": (2, [DIST]),
    "dp2_overlap": (2, [DIST, f"{MEG}.distributed_data_parallel_config.overlap_grad_reduce=true"]),
    "dp2_unpacked": (2, [UNPACKED]),
    "pp2_vpp2": (2, [PP2, VPP2]),
    "pp2_vpp2_unpacked": (2, [PP2, VPP2, UNPACKED]),
    "tp2_pp2": (4, [TP2, PP2]),
    "tp2_sp_pp2_unshared": (4, [TP2, SP, PP2, UNSHARED]),
    "dp2_tp2_sp": (4, [TP2, SP, DIST]),
    "dp2_pp2": (4, [PP2, DIST]),
}
# dp4 leaves ranks without a pair in some micro-batches: packs of nothing but padding
EMPTY_PACKS = (4, ["policy.train_global_batch_size=4", "policy.sequence_packing.train_mb_tokens=200"])
COMPARED = ("loss", "preference_loss", "sft_loss", "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm")


def run(tmp_path, model, world_size, overrides, name):
    folder = tmp_path / name
    folder.mkdir()
    config = make_config(folder, model, dpo={"sft_loss_weight": 0.1, "val_at_end": True})
    assert run_distributed(train, world_size, str(config), overrides, init_process_group=False) == [0] * world_size
    return read_metrics(folder / "logs")


def assert_equal_runs(got, want, tolerance=1e-5):
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for mine, theirs in zip(got, want, strict=True):
        for name in COMPARED:
            a, b = mine[f"train/{name}"], theirs[f"train/{name}"]
            # a margin is a difference of logps: its rounding is theirs
            scale = abs(theirs["train/logps/chosen"]) * 0.1 if name == "rewards/margins" else abs(b)
            assert abs(a - b) <= tolerance * scale, f"step {mine['step']} {name}: {a!r} instead of {b!r}"
    assert got[-1]["validation-held_out/loss"] == pytest.approx(want[-1]["validation-held_out/loss"], rel=tolerance)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), model, 1, [], "one")


@pytest.mark.distributed
def test_the_first_step_is_ln_2(one_process):
    first = one_process[0]
    assert first["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert one_process[-1]["train/rewards/margins"] != 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, model, one_process, tmp_path):
    world_size, overrides = LAYOUTS[name]
    assert_equal_runs(run(tmp_path, model, world_size, overrides, name), one_process)


@pytest.mark.distributed
def test_ranks_without_a_pair(model, tmp_path):
    world_size, overrides = EMPTY_PACKS
    one = run(tmp_path, model, 1, overrides, "one")
    assert_equal_runs(run(tmp_path, model, world_size, overrides, "dp4"), one)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["llama_tied", "qwen2", "qwen3"])
def test_families_under_tensor_and_pipeline_parallel(case, tmp_path):
    """Tied embeddings live on two stages; QKV biases and QK norms have gradients of their own to sum."""
    model = make_model(tmp_path / "model", case)
    one = run(tmp_path, model, 1, [], "one")
    assert_equal_runs(run(tmp_path, model, 4, [TP2, SP, PP2], "tp2_sp_pp2"), one)
