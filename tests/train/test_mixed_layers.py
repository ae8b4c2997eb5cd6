"""Experts in some layers only, routers with a correction bias, tensors that nothing computes with: trained from an imported
folder, stopped, resumed elsewhere, exported."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from megadpo.lora.export import export
from megadpo.model.weights import export_hf, import_hf
from tests.families.cases import make_case
from tests.helpers.overrides import BALANCE, DIST, EP2, PP2
from tests.helpers.runs import VOCAB, make_config, read_metrics
from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.model.weights.hf_models import read_tensors
from tests.train.test_resume import COSINE, SAVING, go

BEHIND = "model.layers.4.eh_proj.weight"  # of a layer that predicts several tokens


def folder_for(path, model):
    path.mkdir()
    make_config(path, model, policy={"megatron_cfg": {**COSINE["megatron_cfg"], **BALANCE}}, checkpointing=SAVING)
    return path


@pytest.fixture
def model(tmp_path):
    folder = make_case(tmp_path / "model", "glm4_moe", vocab_size=VOCAB, max_position_embeddings=128)
    tiny_tokenizer(vocab_size=VOCAB).save_pretrained(folder)
    tensors = {**read_tensors(folder), BEHIND: torch.randn(3, 3)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def untrained(tensors):
    return {name for name in tensors if name.endswith("correction_bias") or name == BEHIND}


@pytest.mark.distributed
def test_from_an_import_and_with_the_layers_elsewhere(model, tmp_path):
    before = read_tensors(model)
    import_hf(model, tmp_path / "megatron")
    imported = [f"policy.model_name={tmp_path / 'megatron'}"]
    whole, parts = folder_for(tmp_path / "whole", model), folder_for(tmp_path / "parts", model)
    go(whole / "config.yaml", 1, [DIST], 4)
    go(parts / "config.yaml", 2, [DIST, EP2, *imported], 2)
    go(parts / "config.yaml", 2, [DIST, PP2, *imported], 4)
    for mine, theirs in zip(read_metrics(parts / "logs"), read_metrics(whole / "logs"), strict=True):
        for name in ("train/loss", "train/grad_norm", "train/moe_aux_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (mine["step"], name)
    export_hf(parts / "checkpoints/step_4", tmp_path / "exported")
    after = read_tensors(tmp_path / "exported")
    assert after.keys() == before.keys()
    assert {name for name, tensor in before.items() if torch.equal(after[name], tensor)} == untrained(before)


@pytest.mark.distributed
def test_a_merged_adapter_comes_with_what_is_not_trained(model, tmp_path):
    before = read_tensors(model)
    run = folder_for(tmp_path / "run", model)
    go(run / "config.yaml", 1, ["policy.megatron_cfg.peft={enabled: true, dim: 4}"], 2)
    export(run / "checkpoints/step_2", tmp_path / "merged", merge=True, dtype=torch.bfloat16)
    after = read_tensors(tmp_path / "merged")
    assert after.keys() == before.keys()
    for name in untrained(before):
        assert torch.equal(after[name], before[name]), name
    assert {tensor.dtype for name, tensor in after.items() if name not in untrained(before)} == {torch.bfloat16}
