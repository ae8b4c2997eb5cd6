"""Vision-language models: where their config.json says what of the text model, and tensors that go through untouched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megadpo.config import ConfigError
from megadpo.families import parse_architecture, read_architecture, weight_table
from megadpo.model.weights import export_hf, import_hf
from megadpo.model.weights.carried import keep_carried
from megadpo.model.weights.hf_folder import HfWeights
from tests.families.cases import make_case
from tests.families.configs import LLAMA
from tests.model.weights.hf_models import read_tensors

TEXT = {key: value for key, value in LLAMA.items() if key not in ("architectures", "model_type")}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}


def of(name, **said):
    return parse_architecture({"architectures": [f"{name}ForConditionalGeneration"], **said})


def test_a_flat_file_and_one_with_a_text_part_say_the_same():
    flat = of("Qwen2_5_VL", **TEXT, **MROPE)
    assert flat == of("Qwen2_5_VL", text_config={**TEXT, **MROPE})
    assert (flat.attention.rotary.theta, flat.attention.rotary.scaling, flat.attention.qkv_bias) == (1e6, None, True)


def test_tied_embeddings_are_said_outside():
    inside = {**TEXT, "tie_word_embeddings": False}
    assert of("Mistral3", text_config=inside).tie_word_embeddings  # the class's own default
    assert not of("Mistral3", text_config=inside, tie_word_embeddings=False).tie_word_embeddings


@pytest.mark.parametrize(
    ("name", "said", "tokens"),
    [
        ("Qwen2_5_VL", {}, (151655, 151656)),
        ("Qwen2_5_VL", {"image_token_id": 5, "video_token_id": None}, (5,)),
        ("Gemma3", {}, (262144,)),
        ("Mistral3", {}, (10,)),
        ("Mistral3", {"image_token_index": 7}, (7,)),
    ],
)
def test_what_stands_for_images_is_known(name, said, tokens):
    """By the file, or by the class's own default."""
    assert of(name, text_config=TEXT, **said).media_tokens == tokens


@pytest.mark.parametrize(
    ("name", "said", "where"),
    [
        ("Mistral3", {"text_config": {**TEXT, "model_type": "ministral3"}}, "config.json: text_config: model_type"),
        ("Mistral3", {"text_config": {**TEXT, "attention_bias": True}}, "config.json: text_config: attention_bias"),
        ("Mistral3", {"text_config": 3}, "config.json: text_config"),
        ("Mistral3", {"text_config": TEXT, "image_token_index": "a"}, "config.json: image_token_index"),
        ("Mistral3", {"text_config": TEXT, "quantization_config": {"bits": 4}}, "quantization_config"),
        ("Gemma3", {"text_config": {"final_logit_softcapping": 2.0}}, "final_logit_softcapping"),
        ("Qwen2_5_VL", {"text_config": {**TEXT, "rope_scaling": {"type": "su"}}}, "rope_type"),
    ],
)
def test_refused_by_name(name, said, where):
    with pytest.raises(ConfigError) as caught:
        of(name, **said)
    assert caught.value.problems[0].where.endswith(where)


def test_towers_go_through_checkpoints_untouched(tmp_path):
    """In their own dtype, whatever the export's; also by way of a second checkpoint, as a run writes it."""
    folder = make_case(tmp_path / "hf", "mistral3")
    tensors = read_tensors(folder)
    tower = {name: tensor for name, tensor in tensors.items() if not name.startswith("language_model.")}
    assert len(tower) > 10
    import_hf(folder, tmp_path / "first")
    keep_carried(tmp_path / "first" / "hf", tmp_path / "first" / "hf" / "second")
    kept = read_tensors(tmp_path / "first" / "hf" / "second" / "carried")
    assert kept.keys() == tower.keys() and all(torch.equal(kept[name], one) for name, one in tower.items())
    export_hf(tmp_path / "first", tmp_path / "back", dtype=torch.bfloat16)
    back = read_tensors(tmp_path / "back")
    assert back.keys() == tensors.keys() and not (tmp_path / "back" / "carried").exists()
    assert all(torch.equal(back[name], one) for name, one in tower.items())
    assert back["language_model.model.norm.weight"].dtype == torch.bfloat16


def test_a_tensor_of_neither_part_is_named(tmp_path):
    folder = make_case(tmp_path / "hf", "qwen2_5_vl")
    tensors = read_tensors(folder)
    save_file({**tensors, "audio.weight": torch.zeros(1)}, Path(folder) / "model.safetensors")
    table = weight_table(read_architecture(folder))
    (problem,) = HfWeights.open(folder, table).problems(table)
    assert problem.where.endswith("audio.weight")
