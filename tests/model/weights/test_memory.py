"""Peak memory of a process that loads, imports or exports: never the model, never a file, only what is in hand."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megadpo.config.architecture import parse_architecture
from megadpo.model.weights.tables import weight_table
from tests.helpers.distributed import REPOSITORY

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "dtype": "float32",
}
FLOAT_BYTES = 4
SLACK_BYTES = 25 * 10**6
"""Of the interpreter: modules imported on first use, JSON, allocator rounding. The budget allows 200 MB."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of about 400 MB in one file."""
    folder = tmp_path_factory.mktemp("memory") / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = weight_table(parse_architecture(CONFIG)).hf_shapes
    save_file({n: torch.ones(s) for n, s in shapes.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").stat().st_size > 390 * 10**6
    return folder


def peak_bytes(action: str, source: Path, target: Path) -> int:
    """Over what the process held before."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.model.weights.memory_worker", action, source, target]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE).stdout)


LARGEST_TENSOR_BYTES = CONFIG["vocab_size"] * CONFIG["hidden_size"] * FLOAT_BYTES  # 100 MB
LAYER_BYTES = FLOAT_BYTES * sum(
    math.prod(shape) for e in weight_table(parse_architecture(CONFIG)).entries if e.layer == 0 for shape in e.shapes
)


def test_a_rank_loads_within_its_shard_and_one_tensor(folder, tmp_path):
    peak = peak_bytes("load", folder, tmp_path / "none")
    print(peak)
    assert peak < LARGEST_TENSOR_BYTES, peak
    # It reads a quarter of each tensor; where a quarter of the columns is wanted, all of the tensor's pages are mapped.
    assert peak < LARGEST_TENSOR_BYTES / 4 + SLACK_BYTES, peak


def test_conversion_streams(folder, tmp_path):
    peak = peak_bytes("import", folder, tmp_path / "megatron")
    # One file's tensors (a layer, or the embedding), and the mapped pages that are being copied.
    assert peak < max(LAYER_BYTES, LARGEST_TENSOR_BYTES) + LARGEST_TENSOR_BYTES + SLACK_BYTES, peak
    peak = peak_bytes("export", tmp_path / "megatron", tmp_path / "hf")
    assert peak < 2 * LARGEST_TENSOR_BYTES + SLACK_BYTES, peak  # the tensor, and one saved shard of it
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 390 * 10**6
