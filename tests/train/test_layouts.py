"""Truths 1 and 2: ln 2 at the first step, and what tests/layouts has no row for: other families, deeper pipelines, ranks
without a pair, the distributed optimizer on its own."""

from __future__ import annotations

import math

import pytest

from tests.helpers.equal_runs import assert_equal_runs, run
from tests.helpers.overrides import CP2, CP4, DIST, MEG, PP2, RECOMPUTE, SP, TP2, VPP2, VPP3
from tests.helpers.runs import make_model

SIX_LAYERS = {
    "pp3_vpp2": (3, [f"{MEG}.pipeline_model_parallel_size=3", VPP2]),
    "tp2_sp_pp2_vpp3": (4, [TP2, SP, PP2, VPP3]),
}
MANY_PACKS = ["policy.sequence_packing.train_mb_tokens=100", "policy.train_global_batch_size=12"]
# dp4 leaves ranks without a pair in some micro-batches: packs of nothing but padding
EMPTY_PACKS = ["policy.train_global_batch_size=4", "policy.sequence_packing.train_mb_tokens=200"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", model, 1, [])


@pytest.mark.distributed
def test_the_first_step_is_ln_2(one_process):
    first = one_process.metrics[0]
    assert first["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert one_process.metrics[-1]["train/rewards/margins"] != 0


@pytest.mark.distributed
def test_the_distributed_optimizer_of_one_process(model, one_process, tmp_path):
    assert_equal_runs(run(tmp_path / "run", model, 1, [DIST]), one_process)


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("six_layers")
    model = make_model(folder / "model", "llama_tied", num_hidden_layers=6)
    return model, run(folder / "one", model, 1, MANY_PACKS)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SIX_LAYERS)
def test_virtual_pipeline_with_tied_embeddings(name, six_layers, tmp_path):
    """Several groups of micro-batches, each stage expecting the shapes of its own next one (parallel/transfers.py)."""
    model, one = six_layers
    world_size, overrides = SIX_LAYERS[name]
    assert_equal_runs(run(tmp_path / "run", model, world_size, [*MANY_PACKS, *overrides]), one)


@pytest.mark.distributed
def test_ranks_without_a_pair(model, tmp_path):
    one = run(tmp_path / "one", model, 1, EMPTY_PACKS)
    assert_equal_runs(run(tmp_path / "dp4", model, 4, EMPTY_PACKS), one)
    assert_equal_runs(run(tmp_path / "dp2_cp2", model, 4, [*EMPTY_PACKS, CP2]), one)


@pytest.mark.distributed
def test_biases_under_tensor_and_pipeline_parallel(tmp_path):
    """QKV biases have gradients of their own to sum."""
    model = make_model(tmp_path / "model", "qwen2")
    one = run(tmp_path / "one", model, 1, [])
    assert_equal_runs(run(tmp_path / "tp2_sp_pp2", model, 4, [TP2, SP, PP2]), one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(4, [CP2, TP2, SP]), (4, [CP2, PP2])], ids=["cp2_tp2_sp", "cp2_pp2"])
@pytest.mark.parametrize("case", ["llama_tied", "qwen2", "qwen3"])
def test_families_under_context_parallel(case, layout, tmp_path):
    model = make_model(tmp_path / "model", case)
    one = run(tmp_path / "one", model, 1, [])
    assert_equal_runs(run(tmp_path / "cut", model, *layout), one)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [(4, [CP4]), (4, [CP2, PP2, VPP2, RECOMPUTE])], ids=["cp4", "cp2_pp2_vpp2"])
def test_context_parallel_equals_one_process(layout, model, one_process, tmp_path):
    """And the ranks do hold parts: two whole runs side by side would give the same losses."""
    got = run(tmp_path / "run", model, *layout)
    assert_equal_runs(got, one_process)
    for mine, alone in zip(got.metrics, one_process.metrics, strict=True):
        assert 1 <= mine["train/context_imbalance"] <= 1.1
        assert mine["train/num_tokens"] == alone["train/num_tokens"]


@pytest.mark.distributed
def test_a_loss_without_a_reference(model, tmp_path):
    """simpo, with stages that see no loss and yet take part in its reduction; rewards are the policy's own."""
    simpo = {"loss_type": "simpo", "preference_average_log_probs": True, "reference": {"mode": "none"}}
    one = run(tmp_path / "one", model, 1, [], dpo=simpo)
    assert one.metrics[0]["train/rewards/margins"] != 0 and one.metrics[0]["train/preference_loss"] > 0
    assert_equal_runs(run(tmp_path / "tp2_sp_pp2", model, 4, [TP2, SP, PP2], dpo=simpo), one)


@pytest.mark.slow
@pytest.mark.distributed
def test_context_parallel_with_the_plain_kernel(model, one_process, tmp_path):
    assert_equal_runs(run(tmp_path / "run", model, 2, [CP2, "policy.attention_kernel=sdpa"]), one_process)
