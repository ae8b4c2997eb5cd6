"""Peak memory of a process that loads, imports or exports: never the model, never a file, only what is in hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megadpo.families import parse_architecture, weight_table
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


@pytest.fixture(scope="module")
def peaks(folder, tmp_path_factory) -> dict[str, int]:
    """Bytes over what the process held before, by action."""
    work = tmp_path_factory.mktemp("work")
    command = [sys.executable, "-W", "ignore", "-m", "tests.model.weights.memory_worker", folder, work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )


LARGEST_TENSOR_BYTES = CONFIG["vocab_size"] * CONFIG["hidden_size"] * FLOAT_BYTES  # 100 MB


def test_a_rank_loads_within_its_shard_and_one_tensor(peaks):
    assert peaks["load"] < LARGEST_TENSOR_BYTES, peaks
    # It reads a quarter of each tensor; where a quarter of the columns is wanted, all of the tensor's pages are mapped.
    assert peaks["load"] < LARGEST_TENSOR_BYTES / 4 + SLACK_BYTES, peaks


def test_conversion_streams(peaks):
    # Import: the file's tensors (a layer, or the embedding), the mapped pages that are being copied, and what malloc
    # keeps of the last layer. Export: a tensor, and torch.load of a saved shard of it. The model is 415 MB.
    assert peaks["import"] < 3 * LARGEST_TENSOR_BYTES, peaks
    assert peaks["export"] < 3 * LARGEST_TENSOR_BYTES + 2 * SLACK_BYTES, peaks
