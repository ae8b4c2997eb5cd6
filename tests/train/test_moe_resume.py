"""Checkpoints of models with experts: resumed with the experts elsewhere, exported, and refused layouts."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import BALANCE, DIST, EP2, ETP2, PP2, SP, TP2
from tests.helpers.runs import make_config, make_model, read_metrics, train
from tests.train.test_resume import COSINE, SAVING, bits, go

ROUTERS = [
    "policy.megatron_cfg.freeze_moe_router=true",
    "policy.megatron_cfg.moe_router_load_balancing_type=none",
    "policy.megatron_cfg.moe_aux_loss_coeff=null",
]
FROZEN = [*ROUTERS, 'policy.freeze=[model.embed_tokens.weight,"model.layers.{0..1}.*"]']


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "qwen2_moe", "qwen2_moe")


def folder_for(path, model):
    path.mkdir()
    megatron = {**COSINE["megatron_cfg"], **BALANCE}
    make_config(path, model, policy={"megatron_cfg": megatron}, checkpointing=SAVING)
    return path


@pytest.mark.distributed
def test_resume_is_bit_for_bit(model, tmp_path):
    whole, parts = folder_for(tmp_path / "whole", model), folder_for(tmp_path / "parts", model)
    go(whole / "config.yaml", 2, [EP2, DIST], 4)
    go(parts / "config.yaml", 2, [EP2, DIST], 2)
    go(parts / "config.yaml", 2, [EP2, DIST], 4)
    assert bits(parts, range(1, 5)) == bits(whole, range(1, 5))


@pytest.mark.distributed
def test_resume_with_the_experts_elsewhere_and_export(model, tmp_path):
    from transformers import AutoModelForCausalLM

    from megadpo.model.weights.convert import export_hf

    whole, parts = folder_for(tmp_path / "whole", model), folder_for(tmp_path / "parts", model)
    go(whole / "config.yaml", 1, [DIST], 8)
    go(parts / "config.yaml", 2, [DIST, EP2], 2)
    go(parts / "config.yaml", 2, [DIST, TP2, SP, ETP2], 4)
    go(parts / "config.yaml", 2, [DIST, PP2], 6)
    go(parts / "config.yaml", 1, [DIST], 8)
    for mine, theirs in zip(read_metrics(parts / "logs"), read_metrics(whole / "logs"), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/moe_aux_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (mine["step"], name)
    states = []
    for folder, step in ((parts, 4), (whole, 4)):
        export_hf(folder / f"checkpoints/step_{step}", folder / "exported")
        states.append(AutoModelForCausalLM.from_pretrained(folder / "exported").state_dict())
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    got, want = states
    assert got.keys() == start.keys()
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=0, atol=1e-5), name
        assert not torch.equal(want[name], start[name]), name  # routers, experts and shared gates all learn


@pytest.mark.distributed
def test_from_an_imported_folder_with_frozen_routers(model, tmp_path):
    from megadpo.model.weights.convert import export_hf, import_hf
    from tests.model.weights.hf_models import read_tensors

    import_hf(model, tmp_path / "megatron")
    made = folder_for(tmp_path / "run", model)
    from_import = [f"policy.model_name={tmp_path / 'megatron'}"]
    go(made / "config.yaml", 2, [EP2, *ROUTERS, *from_import], 2)
    again = folder_for(tmp_path / "again", model)
    go(again / "config.yaml", 1, ROUTERS, 2)
    for mine, theirs in zip(read_metrics(made / "logs"), read_metrics(again / "logs"), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert "train/moe_aux_loss" not in mine
    export_hf(made / "checkpoints/step_2", tmp_path / "exported")
    before, after = read_tensors(model), read_tensors(tmp_path / "exported")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == name.endswith("mlp.gate.weight"), name


def test_refused_before_any_process_group(model, tmp_path, capfd):
    config = make_config(tmp_path, model)
    overrides = [TP2, "policy.megatron_cfg.expert_model_parallel_size=3"]
    assert run_distributed(train, 1, str(config), overrides, init_process_group=False) == [2]


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [[], [DIST]], ids=["", "distributed_optimizer"])
def test_resume_with_frozen_routers_and_layers(optimizer, model, tmp_path):
    """The first stage has nothing to train, the second everything but its routers; then the experts move."""
    whole, parts = folder_for(tmp_path / "whole", model), folder_for(tmp_path / "parts", model)
    go(whole / "config.yaml", 1, [*FROZEN, *optimizer], 5)
    go(parts / "config.yaml", 2, [*FROZEN, *optimizer, PP2], 2)
    go(parts / "config.yaml", 2, [*FROZEN, *optimizer, EP2], 4)
    go(parts / "config.yaml", 1, [*FROZEN, *optimizer], 5)
    for mine, theirs in zip(read_metrics(parts / "logs"), read_metrics(whole / "logs"), strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), (mine["step"], name)
    for others in (ROUTERS, FROZEN[1:]):  # layers that were frozen, and then routers, are to be trained
        overrides = [*others, *optimizer, "dpo.max_num_steps=6", "dpo.max_num_epochs=2"]
        codes = run_distributed(train, 1, str(parts / "config.yaml"), overrides, init_process_group=False)
        assert codes == [2]
