"""`dpo.reference.model_name`: a reference that can't run beside the policy is refused before anything is built."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file, save_file

from megadpo.commands import main
from tests.helpers.overrides import PP2, TP2
from tests.helpers.runs import make_config, make_model
from tests.model.weights.hf_models import make_hf_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "policy")
    make_model(folder / "one_group", num_key_value_heads=1)
    make_model(folder / "three_layers", num_hidden_layers=3)
    make_hf_folder(folder / "few_tokens", "llama", vocab_size=100)
    tensors = load_file(make_model(folder / "cut_short") / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "cut_short/model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("one_group", [TP2], "a divisor of the model's 1 key-value heads (for dpo.reference.model_name)"),
        ("three_layers", [PP2], "a divisor of the model's 3 layers (for dpo.reference.model_name)"),
        # under tensor parallelism its log-probabilities were nonsense without an error
        ("few_tokens", [TP2], "its vocabulary has 100"),
        ("cut_short", [], "expected model.norm.weight"),
        ("one_group", [], ""),
    ],
)
def test_another_reference(name, layout, words, models, tmp_path, capsys):
    config = make_config(tmp_path, models / "policy")
    overrides = [f"dpo.reference.model_name={models / name}", "data.cache_dir=null", *layout]
    assert main(["check", str(config), "--world-size", "2", *overrides]) == (2 if words else 0)
    assert words in capsys.readouterr().err
