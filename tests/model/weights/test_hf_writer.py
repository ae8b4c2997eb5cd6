"""The safetensors files that are written by hand, read with safetensors."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from megadpo.model.weights.hf_writer import TensorSpec, write_hf_weights

TENSORS = {
    "odd": torch.arange(3, dtype=torch.bfloat16),
    "wide": torch.arange(4, dtype=torch.float32).view(2, 2),
    "last": torch.arange(5, dtype=torch.float16),
}
SPECS = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]


def test_tensors_of_several_dtypes_begin_at_multiples_of_their_size(tmp_path):
    write_hf_weights(tmp_path, SPECS, [TENSORS])
    content = (tmp_path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    for name, tensor in TENSORS.items():
        assert (8 + header_bytes + header[name]["data_offsets"][0]) % tensor.itemsize == 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own(tmp_path):
    write_hf_weights(tmp_path, SPECS, [{name: tensor} for name, tensor in TENSORS.items()], max_file_bytes=10)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6 + 16 + 10
    assert index["weight_map"] == {n: f"model-0000{i}-of-00003.safetensors" for i, n in enumerate(TENSORS, start=1)}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"odd": TENSORS["odd"]}], "never written: wide, last"),
        ([{**TENSORS, "wide": TENSORS["wide"].double()}], "wide: planned .* got .* torch.float64"),
        ([{**TENSORS, "wide": TENSORS["wide"].flatten()}], r"wide: planned .* got \(4,\)"),
    ],
)
def test_what_differs_from_the_plan_is_an_error(tmp_path, groups, message):
    with pytest.raises(ValueError, match=message):
        write_hf_weights(tmp_path, SPECS, groups)
