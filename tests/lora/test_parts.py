"""A Hugging Face module that is several matrices one below the other: q, k and v as qkv_proj."""

from __future__ import annotations

import dataclasses

import torch

from megadpo.config.schema_peft import PeftConfig
from megadpo.families import parse_architecture
from megadpo.lora.adapter import LinearAdapter, LinearCut
from megadpo.lora.attach import load_a, load_b
from megadpo.lora.checkpoint import LoraCheckpoint
from megadpo.lora.peft_folder import read_peft, tensor_name, write_peft
from megadpo.lora.targets import Target, find_targets
from tests.lora.test_targets import LLAMA, SHAPE, adapters

PHI3 = parse_architecture({"architectures": ["Phi3ForCausalLM"], **SHAPE})
MODULE = "model.layers.0.self_attn.qkv_proj"
ALONE = LinearCut(None, 0, 1, sequence_parallel=False)  # type: ignore[arg-type]  no collective is run
LIKE = {"dtype": torch.float64, "device": torch.device("cpu")}


def peft(*names: str) -> PeftConfig:
    return PeftConfig(enabled=True, dim=3, alpha=5.0, target_modules=names)


def filled(target: Target) -> LinearAdapter:
    adapter = LinearAdapter(target, peft(), ALONE, **LIKE)
    torch.manual_seed(1)
    for shared in target.adapters:
        load_a(adapter, shared, torch.randn(3, target.in_features))
        for module in shared:
            load_b(adapter, module, torch.randn(target.out_features(module), 3))
    return adapter


def test_its_parts_share_an_a():
    for names in (("qkv_proj",), ("linear_qkv",), ("all-linear",), ()):
        assert adapters(find_targets(peft(*names), PHI3))[0] == "qkv_proj_0+qkv_proj_1+qkv_proj_2"
    assert adapters(find_targets(PeftConfig(enabled=True, exclude_modules=("qkv_proj",)), PHI3))[0] == "o_proj"


def test_it_computes_what_three_modules_with_one_a_do():
    apart = find_targets(peft("linear_qkv"), LLAMA)[0]
    together = find_targets(peft("qkv_proj"), PHI3)[0]
    x = torch.randn(4, apart.in_features, dtype=torch.float64)
    assert torch.equal(filled(together)(x), filled(apart)(x))
    for rank in range(2):
        assert together.rectangles(rank, 2) == apart.entry.rectangles(rank, 2)


def test_in_pefts_format_it_is_one_matrix(tmp_path, monkeypatch):
    a, b = torch.randn(3, 32), torch.randn(64, 3)
    tensors = {tensor_name(MODULE, "A"): a, tensor_name(MODULE, "B"): b}
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", peft(), tensors, [MODULE], base="base", arch=PHI3)
    found = read_peft(tmp_path / "adapter", "x", PHI3)
    [target] = find_targets(found.peft, PHI3)
    adapter = LinearAdapter(target, found.peft, ALONE, **LIKE)
    found.load([adapter])

    x = torch.randn(4, 32, dtype=torch.float64)
    want = x @ (b.double() @ a.double()).T * found.peft.scale
    places = target.entry.rectangles()
    in_order = torch.cat([want[:, one.source_index[0]] for one in places], dim=-1)
    torch.testing.assert_close(adapter(x), in_order)

    stored = {f"decoder.layers.0.self_attention.linear_qkv.lora.{name}": p for name, p in adapter.named_parameters()}
    monkeypatch.setattr("megadpo.lora.checkpoint.DistFolder", lambda folder: Stored(stored))
    checkpoint = LoraCheckpoint(tmp_path, found.peft, PHI3, "base", "")
    [(name, got_a, got_b)] = checkpoint.tensors()
    assert name == MODULE and torch.equal(got_a, a.double()) and torch.equal(got_b, b.double())


@dataclasses.dataclass
class Stored:
    tensors: dict[str, torch.Tensor]

    def region(self, key, index):
        return key

    def read(self, region):
        return self.tensors[region].detach()
