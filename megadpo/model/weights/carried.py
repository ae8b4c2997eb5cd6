"""Tensors of a model folder that megadpo doesn't use, such as a vision tower's. Checkpoints and exports keep them
unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megadpo.families import read_architecture, weight_table
from megadpo.model.weights.hf_folder import DTYPES, INDEX_FILE, SINGLE_FILE, HfWeights
from megadpo.model.weights.hf_writer import TensorSpec, write_hf_weights

FOLDER = "carried"
"""Folder in a checkpoint's hf/ with these tensors as Hugging Face files."""


def keep_carried(source: str | Path, target: str | Path) -> None:
    """Write these tensors of the model folder `source` to `target`, a checkpoint's hf/. Writes nothing if there are none.
    Memory: one tensor."""
    specs, tensors = carried_tensors(source)
    if specs:
        (Path(target) / FOLDER).mkdir(parents=True)
        write_hf_weights(Path(target) / FOLDER, specs, tensors)


def carried_tensors(source: str | Path) -> tuple[list[TensorSpec], Iterator[dict[str, torch.Tensor]]]:
    """These tensors of `source`, a Hugging Face folder or a checkpoint's hf/, read one by one."""
    source = Path(source)
    if (source / FOLDER).is_dir():
        weights = HfWeights.open(source / FOLDER)
        return _specs(weights, list(weights.tensors)), _tensors(weights, list(weights.tensors))
    table = weight_table(read_architecture(source))
    if not table.carried or not any((source / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return [], iter(())
    weights = HfWeights.open(source)
    names = weights.carried(table)
    return _specs(weights, names), _tensors(weights, names)


def _specs(weights: HfWeights, names: list[str]) -> list[TensorSpec]:
    tensors = weights.tensors
    return [TensorSpec(name, tensors[name].shape, DTYPES[tensors[name].dtype]) for name in names]


def _tensors(weights: HfWeights, names: list[str]) -> Iterator[dict[str, torch.Tensor]]:
    for name in names:
        with weights.slices([name]) as (source,):
            yield {name: source[(slice(None),) * len(weights.tensors[name].shape)]}
