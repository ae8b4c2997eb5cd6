"""Truth 2 for what tests/layouts has no row for: shared experts, Mixtral, the loss over micro-batches, ranks without a
pair, experts over four ranks."""

from __future__ import annotations

import pytest

from tests.helpers.equal_runs import assert_equal_runs, run
from tests.helpers.overrides import BALANCE, CP2, DIST, EP2, ETP2, MEG, PP2, RECOMPUTE, SELECTIVE, SP, TP2, UNPACKED
from tests.helpers.runs import make_model

EP4 = f"{MEG}.expert_model_parallel_size=4"
ALLGATHER = f"{MEG}.moe_token_dispatcher_type=allgather"
LAYOUTS = {
    # name: (processes, overrides)
    "recompute_experts": (1, [RECOMPUTE, SELECTIVE, f"{MEG}.recompute_modules=[moe]"]),
    "recompute_shared_experts": (1, [RECOMPUTE, SELECTIVE, f"{MEG}.recompute_modules=[shared_experts]"]),
    "ep4_tp2_sp_allgather": (4, [EP4, TP2, SP, ALLGATHER]),
    "ep2_etp2_tp2_sp_distributed_optimizer": (4, [EP2, ETP2, TP2, SP, DIST]),
    "ep2_pp2_recompute": (4, [EP2, PP2, RECOMPUTE]),
    "cp2_ep2_tp2_sp_distributed_optimizer": (4, [CP2, EP2, TP2, SP, DIST]),
    "cp2_ep4_allgather_recompute": (4, [CP2, EP4, ALLGATHER, RECOMPUTE]),
}
# The loss over a micro-batch's tokens: equal wherever the micro-batches are, here 2 pairs each
PER_MICRO_BATCH = [UNPACKED, f"{MEG}.moe_router_load_balancing_type=aux_loss"]
SAME_MICRO_BATCHES = {
    "tp2_sp_ep2": (2, [TP2, SP, EP2]),
    "ep2_pp2": (4, [EP2, PP2]),
    "cp2_ep2": (2, [CP2, EP2]),
}
# dp4 leaves ranks without a pair in some micro-batches: packs of nothing but padding
EMPTY_PACKS = ["policy.train_global_batch_size=4", "policy.sequence_packing.train_mb_tokens=200"]
POLICY = {"megatron_cfg": BALANCE}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "qwen2_moe", "qwen2_moe")


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", model, 1, [], policy=POLICY)


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, model, one_process, tmp_path):
    world_size, overrides = LAYOUTS[name]
    assert_equal_runs(run(tmp_path / "run", model, world_size, overrides, policy=POLICY), one_process)


@pytest.fixture(scope="module")
def one_process_by_micro_batch(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one") / "run", model, 1, PER_MICRO_BATCH, policy=POLICY)


@pytest.mark.distributed
@pytest.mark.parametrize("name", SAME_MICRO_BATCHES)
def test_the_loss_over_micro_batches(name, model, one_process_by_micro_batch, one_process, tmp_path):
    world_size, overrides = SAME_MICRO_BATCHES[name]
    got = run(tmp_path / "run", model, world_size, [*PER_MICRO_BATCH, *overrides], policy=POLICY)
    assert_equal_runs(got, one_process_by_micro_batch)
    by_answer = one_process.metrics[0]["train/moe_aux_loss"]
    assert got.metrics[0]["train/moe_aux_loss"] != pytest.approx(by_answer, rel=1e-3)


@pytest.mark.distributed
def test_ranks_without_a_pair(model, tmp_path):
    one = run(tmp_path / "one", model, 1, EMPTY_PACKS, policy=POLICY)
    assert_equal_runs(run(tmp_path / "dp4_ep2", model, 4, [*EMPTY_PACKS, EP2], policy=POLICY), one)
    assert_equal_runs(run(tmp_path / "dp2_cp2_ep2", model, 4, [*EMPTY_PACKS, CP2, EP2], policy=POLICY), one)


@pytest.mark.distributed
def test_mixtral_under_expert_and_tensor_parallel(tmp_path):
    model = make_model(tmp_path / "model", "mixtral")
    one = run(tmp_path / "one", model, 1, [], policy=POLICY)
    assert_equal_runs(run(tmp_path / "ep2_tp2", model, 4, [EP2, TP2, SP], policy=POLICY), one)
