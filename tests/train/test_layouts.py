"""Truths 1 and 2: ln 2 at the first step, and every layout gives one process's losses, metrics, gradient norms and
trained weights."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megadpo.config.architecture import read_architecture
from megadpo.model.weights.dist_folder import DistFolder
from megadpo.model.weights.tables import weight_table
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train

MEG = "policy.megatron_cfg"
CP2, CP4 = (f"{MEG}.context_parallel_size={ranks}" for ranks in (2, 4))
TP2, PP2 = f"{MEG}.tensor_model_parallel_size=2", f"{MEG}.pipeline_model_parallel_size=2"
VPP2, VPP3 = (f"{MEG}.virtual_pipeline_model_parallel_size={chunks}" for chunks in (2, 3))
OVERLAP = f"{MEG}.distributed_data_parallel_config.overlap_grad_reduce=true"
SP, DIST = f"{MEG}.sequence_parallel=true", f"{MEG}.optimizer.use_distributed_optimizer=true"
UNSHARED, UNPACKED = "policy.sequence_packing.share_prompt=false", "policy.sequence_packing.enabled=false"
RECOMPUTE, SELECTIVE = f"{MEG}.activation_checkpointing=true", f"{MEG}.recompute_granularity=selective"
BLOCK = f"{MEG}.recompute_method=block"
GATHER = f"{MEG}.distributed_data_parallel_config.overlap_param_gather=true"
LAYOUTS = {
    "unshared": (1, [UNSHARED]),
    "unpacked": (1, [UNPACKED]),
    "recompute": (1, [RECOMPUTE]),
    "recompute_attention": (1, [RECOMPUTE, SELECTIVE]),
    "recompute_modules": (1, [RECOMPUTE, SELECTIVE, f"{MEG}.recompute_modules=[core_attn,layernorm,mlp]"]),
    "distributed_optimizer": (1, [DIST]),
    "tp2": (2, [TP2]),
    "tp2_sp": (2, [TP2, SP]),
    "tp2_sp_recompute": (2, [TP2, SP, RECOMPUTE]),
    "pp2": (2, [PP2]),
    "pp2_uneven": (2, [PP2, f"{MEG}.num_layers_in_first_pipeline_stage=1"]),
    "pp2_unpacked": (2, [PP2, UNPACKED]),
    "dp2": (2, []),
    "dp2_distributed_optimizer": (2, [DIST]),
    "dp2_overlap": (2, [DIST, OVERLAP]),
    "dp2_unpacked": (2, [UNPACKED]),
    "pp2_vpp2": (2, [PP2, VPP2]),
    "pp2_vpp2_unpacked": (2, [PP2, VPP2, UNPACKED]),
    "pp2_vpp2_recompute_block": (2, [PP2, VPP2, RECOMPUTE, BLOCK]),
    "tp2_pp2": (4, [TP2, PP2]),
    "tp2_sp_pp2_unshared": (4, [TP2, SP, PP2, UNSHARED]),
    "dp2_tp2_sp": (4, [TP2, SP, DIST]),
    "dp2_pp2": (4, [PP2, DIST]),
    "cp2": (2, [CP2, RECOMPUTE, SELECTIVE]),
    "cp2_unpacked": (2, [CP2, UNPACKED, DIST]),
    "cp2_tp2_sp": (4, [CP2, TP2, SP, DIST]),
    "cp2_pp2_vpp2": (4, [CP2, PP2, VPP2]),
    "dp2_cp2": (4, [CP2, DIST, OVERLAP]),
    "cp4": (4, [CP4]),
}
CONTEXT_LAYOUTS = {
    "cp2_unshared": (2, [CP2, UNSHARED]),
    "cp2_recompute": (2, [CP2, RECOMPUTE]),
    "cp2_recompute_block": (2, [CP2, RECOMPUTE, BLOCK, f"{MEG}.recompute_num_layers=2"]),
    "cp2_distributed_optimizer": (2, [CP2, DIST]),
    "cp2_sdpa": (2, [CP2, "policy.attention_kernel=sdpa"]),
    "cp2_tp2": (4, [CP2, TP2]),
    "cp2_pp2": (4, [CP2, PP2]),
    "cp2_pp2_recompute_unshared": (4, [CP2, PP2, RECOMPUTE, UNSHARED]),
}
# dp4 leaves ranks without a pair in some micro-batches: packs of nothing but padding
EMPTY_PACKS = (4, ["policy.train_global_batch_size=4", "policy.sequence_packing.train_mb_tokens=200"])
SIX_LAYERS = {
    "pp2_vpp2_uneven": (2, [PP2, VPP2, f"{MEG}.num_layers_in_first_pipeline_stage=2"]),
    "pp3_vpp2_unshared": (3, [f"{MEG}.pipeline_model_parallel_size=3", VPP2, UNSHARED]),
    "tp2_sp_pp2_vpp3": (4, [TP2, SP, PP2, VPP3]),
    "dp2_pp2_vpp3_overlap": (4, [PP2, VPP3, DIST, OVERLAP]),
}
NAMES = ("loss", "preference_loss", "sft_loss", "logps/chosen", "logps/rejected", "grad_norm", "rewards/accuracies")
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass
class Outcome:
    """What a run logged, and its weights after the last step by their Megatron names."""

    metrics: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]


def run(tmp_path, model, world_size, overrides, name, target=train):
    folder = tmp_path / name
    folder.mkdir()
    config = make_config(
        folder,
        model,
        dpo={"sft_loss_weight": 0.1, "val_at_end": True},
        checkpointing={"enabled": True, "save_optimizer": False},
    )
    codes = run_distributed(target, world_size, str(config), overrides, init_process_group=False, timeout_s=280)
    assert codes == [0] * world_size
    return Outcome(read_metrics(folder / "logs"), read_weights(folder / "checkpoints/step_3"))


def read_weights(checkpoint):
    entries = weight_table(read_architecture(checkpoint / "hf")).entries
    stored = DistFolder(checkpoint / "model")
    return {e.names[0]: stored.read(r) for e, r in zip(entries, stored.find(entries), strict=True)}


def assert_equal_runs(got, want, tolerance=1e-5, validated=True):
    assert [r["step"] for r in got.metrics] == [r["step"] for r in want.metrics] == [1, 2, 3]
    for mine, theirs in zip(got.metrics, want.metrics, strict=True):
        # a reward is a difference of logps: its rounding is theirs
        scales = {name: abs(theirs[f"train/{name}"]) for name in NAMES}
        scales |= {name: abs(theirs["train/logps/chosen"]) * 0.1 for name in REWARDS}
        if mine["step"] == 1:  # every margin is 0 but for the last bit, whose sign decides what counts as accurate
            del scales["rewards/accuracies"]
        for name, scale in scales.items():
            a, b = mine[f"train/{name}"], theirs[f"train/{name}"]
            assert abs(a - b) <= tolerance * scale, f"step {mine['step']} {name}: {a!r} instead of {b!r}"
    loss = "validation-held_out/loss"
    assert (loss in got.metrics[-1]) == validated
    if validated:
        assert got.metrics[-1][loss] == pytest.approx(want.metrics[-1][loss], rel=tolerance)
    assert got.weights.keys() == want.weights.keys()
    for name, weight in want.weights.items():
        distance = (got.weights[name] - weight).norm() / weight.norm()
        assert distance <= tolerance, f"{name} after 3 steps: {distance:.1e} away"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), model, 1, [], "one")


@pytest.mark.distributed
def test_the_first_step_is_ln_2(one_process):
    first = one_process.metrics[0]
    assert first["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert one_process.metrics[-1]["train/rewards/margins"] != 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, model, one_process, tmp_path):
    world_size, overrides = LAYOUTS[name]
    assert_equal_runs(run(tmp_path, model, world_size, overrides, name), one_process)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CONTEXT_LAYOUTS)
def test_more_of_context_parallelism(name, model, one_process, tmp_path):
    world_size, overrides = CONTEXT_LAYOUTS[name]
    assert_equal_runs(run(tmp_path, model, world_size, overrides, name), one_process)


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six_layers")
    model = make_model(folder / "model", "llama_tied", num_hidden_layers=6)
    return model, run(folder, model, 1, [], "one")


@pytest.mark.distributed
@pytest.mark.parametrize("name", SIX_LAYERS)
def test_virtual_pipeline_with_tied_embeddings(name, six_layers, tmp_path):
    model, one = six_layers
    world_size, overrides = SIX_LAYERS[name]
    assert_equal_runs(run(tmp_path, model, world_size, overrides, name), one)


def train_in_small_buckets(config, overrides):
    """So that a model of the tests has several buckets, the output layer's among them."""
    from megadpo.optimizer import build

    build.DistributedDataParallelConfig = functools.partial(build.DistributedDataParallelConfig, bucket_size=2000)
    return train(config, overrides)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(2, []), (4, [PP2, VPP2])], ids=["dp2", "dp2_pp2_vpp2"])
def test_overlap_of_reduction_and_gather(layout, model, one_process, tmp_path):
    world_size, overrides = layout
    # No validation before the save: its forward pass would gather what the last update left to be gathered.
    overrides = [*overrides, DIST, OVERLAP, GATHER, "dpo.val_at_end=false"]
    got = run(tmp_path, model, world_size, overrides, "overlap", train_in_small_buckets)
    assert_equal_runs(got, one_process, validated=False)


@pytest.mark.distributed
def test_ranks_without_a_pair(model, tmp_path):
    world_size, overrides = EMPTY_PACKS
    one = run(tmp_path, model, 1, overrides, "one")
    assert_equal_runs(run(tmp_path, model, world_size, overrides, "dp4"), one)
    assert_equal_runs(run(tmp_path, model, world_size, [*overrides, CP2], "dp2_cp2"), one)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["llama_tied", "qwen2", "qwen3"])
def test_families_under_tensor_and_pipeline_parallel(case, tmp_path):
    """Tied embeddings live on two stages; QKV biases and QK norms have gradients of their own to sum."""
    model = make_model(tmp_path / "model", case)
    one = run(tmp_path, model, 1, [], "one")
    assert_equal_runs(run(tmp_path, model, 4, [TP2, SP, PP2], "tp2_sp_pp2"), one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", ["llama_tied", "qwen2", "qwen3"])
def test_families_under_context_parallel(case, tmp_path):
    model = make_model(tmp_path / "model", case)
    one = run(tmp_path, model, 1, [], "one")
    for name, sizes in {"cp2_tp2_sp": [CP2, TP2, SP], "cp2_pp2": [CP2, PP2]}.items():
        assert_equal_runs(run(tmp_path, model, 4, sizes, name), one)


@pytest.mark.distributed
def test_context_imbalance_is_logged(model, one_process, tmp_path):
    """And the ranks do hold parts: two whole runs side by side would give the same losses."""
    got = run(tmp_path, model, 2, [CP2], "cp2")
    for mine, alone in zip(got.metrics, one_process.metrics, strict=True):
        assert 1 <= mine["train/context_imbalance"] <= 1.1
        assert mine.keys() - alone.keys() == {"train/context_imbalance"}
        assert mine["train/num_tokens"] == alone["train/num_tokens"]
