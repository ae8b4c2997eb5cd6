"""Exports a checkpoint to Hugging Face's formats, in one process. A LoRA run's becomes an adapter for PEFT, or a whole model
with W + scale * B A in place of W."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megadpo.config.problems import ConfigError, Problem
from megadpo.families import WeightTable, weight_table
from megadpo.lora.checkpoint import LoraCheckpoint
from megadpo.lora.peft_folder import write_peft
from megadpo.model.manifest import verify
from megadpo.model.source import ModelSource
from megadpo.model.weights.carried import carried_tensors
from megadpo.model.weights.convert import (
    CARD_FILE,
    HF_FOLDER,
    MODEL_FOLDER,
    TEMPLATES_FOLDER,
    TOKENIZER_FILES,
    copy_hf_files,
    correct_dtype,
    export_hf,
    source_problems,
    target_problems,
    written_aside,
)
from megadpo.model.weights.dist_folder import DistFolder
from megadpo.model.weights.hf_folder import HfWeights
from megadpo.model.weights.hf_writer import TensorSpec, write_hf_weights
from megadpo.model.weights.load import to_hf


def export(
    megatron: str | Path,
    hf: str | Path,
    *,
    merge: bool = False,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the checkpoint `megatron` to the folder `hf`: a whole model; for a run with LoRA an adapter in PEFT's format, or
    with `merge` the whole model with merged adapters.

    base: the adapters' base model; None: where the run had it. dtype: of the written tensors; None: the checkpoint's, with
    `merge` the base model's. Memory: all adapters, and the base's tensors of one layer. Raises ConfigError as export_hf
    does, and if the base model has other weights now.
    """
    found = LoraCheckpoint.open(megatron)
    if found is None:
        if merge or base is not None:
            named, value = ("--merge", True) if merge else ("--base", base)
            raise ConfigError(Problem(named, value, "nothing for a checkpoint without adapters", "leave it out"))
        export_hf(megatron, hf, dtype=dtype)
        return
    if problems := target_problems(hf) + source_problems(found.folder):
        raise ConfigError(problems)
    verify(found.folder)
    with written_aside(hf) as folder:
        if merge:
            _write_merged(found, found.base_source(base), folder, dtype)
        else:
            _write_adapter(found, folder, base or found.base, dtype)


def _write_adapter(found: LoraCheckpoint, folder: Path, base: str, dtype: torch.dtype | None) -> None:
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in found.peft_tensors().items()}
    modules = [module for module, _, _ in found.tensors()]
    write_peft(folder, found.peft, tensors, modules, base=base, arch=found.arch)
    files = found.folder / HF_FOLDER
    for path in sorted(files.rglob("*")):
        name = path.relative_to(files).as_posix()
        # not config.json: with it transformers would load the folder as a whole model
        if path.is_file() and (name in (*TOKENIZER_FILES, CARD_FILE) or name.startswith(f"{TEMPLATES_FOLDER}/")):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(path.read_bytes())


def _write_merged(found: LoraCheckpoint, source: ModelSource, folder: Path, dtype: torch.dtype | None) -> None:
    table = weight_table(found.arch)
    if table.stacks:
        expected = "a base model with separate tensors for each expert, and none in MXFP4"
        raise ConfigError(Problem("--merge", True, expected, "leave it out: the adapter needs no merging"))
    adapters = {f"{module}.weight": (a, b) for module, a, b in found.tensors()}
    specs, groups = _of_hf(source.hf_files, table) if source.megatron is None else _of_megatron(source.megatron, table)
    kept = {name for entry in table.entries if entry.row.frozen for name in entry.hf}
    specs = [spec if dtype is None or spec.name in kept else dataclasses.replace(spec, dtype=dtype) for spec in specs]

    def merged(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in adapters:
            return weight if name in kept else weight.to(dtype or weight.dtype)
        a, b = adapters[name]
        return (weight.float() + b.float() @ a.float() * found.peft.scale).to(dtype or weight.dtype)

    tensors = ({name: merged(name, weight) for name, weight in group.items()} for group in groups)
    others, their_tensors = carried_tensors(source.hf_files)
    write_hf_weights(folder, [*specs, *others], itertools.chain(tensors, their_tensors))
    copy_hf_files(found.folder / HF_FOLDER, folder)
    correct_dtype(folder / "config.json", specs)


Stream = tuple[list[TensorSpec], Iterator[Mapping[str, torch.Tensor]]]
"""The tensors' specs, and an iterator over the Hugging Face tensors of each entry of the weight table."""


def _of_hf(folder: Path, table: WeightTable) -> Stream:
    weights = HfWeights.open(folder, table)
    if problems := weights.problems(table):
        raise ConfigError(problems)

    def groups() -> Iterator[Mapping[str, torch.Tensor]]:
        for entry in table.entries:
            everything = [tuple(slice(None) for _ in shape) for shape in entry.shapes]
            with weights.slices(entry.hf) as parts:
                whole = (part[index].clone() for part, index in zip(parts, everything, strict=True))
                yield dict(zip(entry.hf, whole, strict=True))

    return [TensorSpec(name, shape, weights.dtype([name])) for name, shape in table.hf_shapes.items()], groups()


def _of_megatron(folder: Path, table: WeightTable) -> Stream:
    stored = DistFolder(folder / MODEL_FOLDER)
    found = list(zip(table.entries, stored.find(table.entries), strict=True))
    specs = [TensorSpec(n, s, region.dtype) for one, region in found for n, s in zip(one.hf, one.shapes, strict=True)]
    return specs, (to_hf(entry, stored.read(region)) for entry, region in found)
