"""Truth 2 for models with experts: every layout gives one process's losses, load-balancing loss and gradient norms."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train
from tests.train.test_layouts import CP2, DIST, MEG, NAMES, PP2, RECOMPUTE, SP, TP2, UNPACKED, UNSHARED, VPP2

EP2, ETP2 = f"{MEG}.expert_model_parallel_size=2", f"{MEG}.expert_tensor_parallel_size=2"
EP4 = f"{MEG}.expert_model_parallel_size=4"
ALLGATHER = f"{MEG}.moe_token_dispatcher_type=allgather"
SELECTIVE = f"{MEG}.recompute_granularity=selective"
BALANCE = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.05}
LAYOUTS = {
    # name: (processes, overrides)
    "unshared": (1, [UNSHARED]),
    "unpacked": (1, [UNPACKED]),
    "allgather": (1, [ALLGATHER, DIST]),
    "recompute": (1, [RECOMPUTE]),
    "recompute_experts": (1, [RECOMPUTE, SELECTIVE, f"{MEG}.recompute_modules=[moe]"]),
    "tp2_sp": (2, [TP2, SP]),
    "tp2_sp_etp2": (2, [TP2, SP, ETP2]),
    "tp2_sp_ep2": (2, [TP2, SP, EP2]),
    "ep2": (2, [EP2]),
    "ep2_allgather_distributed_optimizer": (2, [EP2, ALLGATHER, DIST]),
    "ep2_recompute": (2, [EP2, RECOMPUTE]),
    "etp2": (2, [ETP2]),
    "dp2_distributed_optimizer": (2, [DIST]),
    "pp2": (2, [PP2]),
    "pp2_vpp2": (2, [PP2, VPP2]),
    "ep2_tp2_sp": (4, [EP2, TP2, SP]),
    "ep4_tp2_sp_allgather": (4, [EP4, TP2, SP, ALLGATHER]),
    "ep2_etp2_tp2_sp_distributed_optimizer": (4, [EP2, ETP2, TP2, SP, DIST]),
    "ep2_pp2_recompute": (4, [EP2, PP2, RECOMPUTE]),
    "cp2_ep2": (2, [CP2, EP2]),
    "cp2_ep2_tp2_sp_distributed_optimizer": (4, [CP2, EP2, TP2, SP, DIST]),
    "cp2_ep4_allgather_recompute": (4, [CP2, EP4, ALLGATHER, RECOMPUTE]),
}
# The loss over a micro-batch's tokens: equal wherever the micro-batches are, here 2 pairs each
PER_MICRO_BATCH = [UNPACKED, f"{MEG}.moe_router_load_balancing_type=aux_loss"]
SAME_MICRO_BATCHES = {
    "tp2_sp_ep2": (2, [TP2, SP, EP2]),
    "ep2": (2, [EP2]),
    "ep2_pp2": (4, [EP2, PP2]),
    "cp2_ep2": (2, [CP2, EP2]),
}
# dp4 leaves ranks without a pair in some micro-batches: packs of nothing but padding
EMPTY_PACKS = ["policy.train_global_batch_size=4", "policy.sequence_packing.train_mb_tokens=200"]


def run(tmp_path, model, world_size, overrides, name, **megatron):
    folder = tmp_path / name
    folder.mkdir()
    config = make_config(
        folder,
        model,
        dpo={"sft_loss_weight": 0.1, "val_at_end": True},
        policy={"megatron_cfg": {**BALANCE, **megatron}},
    )
    assert run_distributed(train, world_size, str(config), overrides, init_process_group=False) == [0] * world_size
    return read_metrics(folder / "logs")


def assert_equal_runs(got, want, tolerance=1e-5):
    assert [r["step"] for r in got] == [r["step"] for r in want]
    for mine, theirs in zip(got, want, strict=True):
        for name in (*NAMES, "rewards/margins", "moe_aux_loss"):
            a, b = mine[f"train/{name}"], theirs[f"train/{name}"]
            scale = abs(theirs["train/logps/chosen"]) * 0.1 if name == "rewards/margins" else abs(b)
            assert abs(a - b) <= tolerance * scale, f"step {mine['step']} {name}: {a!r} instead of {b!r}"
    assert got[-1]["validation-held_out/loss"] == pytest.approx(want[-1]["validation-held_out/loss"], rel=tolerance)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "qwen2_moe", "qwen2_moe")


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), model, 1, [], "one")


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name, model, one_process, tmp_path):
    world_size, overrides = LAYOUTS[name]
    assert_equal_runs(run(tmp_path, model, world_size, overrides, name), one_process)


@pytest.fixture(scope="module")
def one_process_by_micro_batch(model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), model, 1, PER_MICRO_BATCH, "one")


@pytest.mark.distributed
@pytest.mark.parametrize("name", SAME_MICRO_BATCHES)
def test_the_loss_over_micro_batches(name, model, one_process_by_micro_batch, one_process, tmp_path):
    world_size, overrides = SAME_MICRO_BATCHES[name]
    got = run(tmp_path, model, world_size, [*PER_MICRO_BATCH, *overrides], name)
    assert_equal_runs(got, one_process_by_micro_batch)
    assert got[0]["train/moe_aux_loss"] != pytest.approx(one_process[0]["train/moe_aux_loss"], rel=1e-3)


@pytest.mark.distributed
def test_ranks_without_a_pair(model, tmp_path):
    one = run(tmp_path, model, 1, EMPTY_PACKS, "one")
    assert_equal_runs(run(tmp_path, model, 4, [*EMPTY_PACKS, EP2], "dp4_ep2"), one)
    assert_equal_runs(run(tmp_path, model, 4, [*EMPTY_PACKS, CP2, EP2], "dp2_cp2_ep2"), one)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_families_under_expert_and_tensor_parallel(case, tmp_path):
    model = make_model(tmp_path / "model", case)
    one = run(tmp_path, model, 1, [], "one")
    assert_equal_runs(run(tmp_path, model, 4, [EP2, TP2, SP], "ep2_tp2"), one)
