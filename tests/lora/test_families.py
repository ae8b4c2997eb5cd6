"""Adapters of experts, and of modules that are several in one, in PEFT's format: peft computes the same log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megadpo.config.schema_peft import PeftConfig
from megadpo.families import parse_architecture
from megadpo.lora.peft_folder import tensor_name, write_peft
from megadpo.lora.targets import find_targets, hf_modules
from tests.families.cases import SIZES, make_case
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import VOCAB
from tests.lora.test_run import largest_error, logps, peft_logps
from tests.train.test_logps import transformers_logps

CASES = {
    # model: target_modules, tensor-parallel ranks
    "mixtral": (["all-linear"], 1),
    "qwen3_moe": (["all-linear"], 1),
    "phi3": (["qkv_proj", "gate_up_proj", "down_proj"], 2),
    "glm4": (["all-linear"], 2),
    "qwen3_5": (["all-linear"], 2),
}


def random_adapter(folder: Path, model: Path, peft: dict[str, Any]) -> Path:
    """On the layers that `peft` names, B not 0."""
    config = PeftConfig(**{**peft, "target_modules": tuple(peft["target_modules"])})
    arch = parse_architecture(json.loads((model / "config.json").read_text()))
    tensors, modules = {}, []
    torch.manual_seed(0)
    for target in find_targets(config, arch):
        for module, (rows, columns) in zip(hf_modules(target.entry), target.entry.shapes, strict=True):
            modules.append(module)
            tensors[tensor_name(module, "A")] = torch.randn(config.dim, columns)
            tensors[tensor_name(module, "B")] = torch.randn(rows, config.dim) / 50
    folder.mkdir()
    write_peft(folder, config, tensors, modules, base=str(model), arch=arch)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_we_do(case, tmp_path, monkeypatch):
    names, tensor = CASES[case]
    peft = {"enabled": True, "dim": 4, "alpha": 8.0, "target_modules": names}
    for name, size in {"vocab_size": VOCAB, "max_position_embeddings": 128}.items():
        monkeypatch.setitem(SIZES, name, size)
    model = make_case(tmp_path / "model", case)
    adapter = random_adapter(tmp_path / "adapter", model, peft)
    want, base = peft_logps(model, adapter), transformers_logps(model)
    assert float(((want - base) / base).abs().max()) > 1e-3
    ours = run_distributed(logps, tensor, str(model), str(adapter), peft, tensor, 1, init_process_group=False)
    assert largest_error(ours, want) < 1e-5
