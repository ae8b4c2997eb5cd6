"""Loads Hugging Face weights into a megatron-core model, where each rank reads only its slices; and converts them back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from megadpo.config.architecture import Architecture
from megadpo.config.grid import Grid
from megadpo.config.problems import ConfigError
from megadpo.families.layouts import Shape
from megadpo.families.weight_table import MEGATRON_LAYER, WeightEntry, weight_table
from megadpo.model.weights.hf_folder import HfWeights, Sliceable

_LAYER_NAME = re.compile(re.escape(MEGATRON_LAYER).replace(r"\{i\}", r"(\d+)") + "(.*)")
_EXPERT_NAME = re.compile(r"(mlp\.experts\.(?:local_experts\.|linear_fc[12]\.(?:weight|bias)))(\d+)(.*)")
"""Matches the number of an expert, in megatron-core's sequential or Transformer Engine's grouped experts."""


def load_shard(
    shard: torch.Tensor, entry: WeightEntry, sources: Sequence[Sliceable], rank: int = 0, size: int = 1
) -> None:
    """Hugging Face -> Megatron: copy the part of `sources` (in the order of `entry.hf`) for rank `rank` of `size` into
    `shard` (on any device), cast to its dtype."""
    for rectangle in entry.rectangles(rank, size):
        shard[rectangle.shard_index].copy_(sources[rectangle.source][rectangle.source_index])


def to_hf(entry: WeightEntry, full: torch.Tensor) -> dict[str, torch.Tensor]:
    """Megatron -> Hugging Face: the tensors of `entry.hf`, from the whole parameter. Views if their rows are adjacent."""
    parts: list[list[torch.Tensor]] = [[] for _ in entry.hf]
    for rectangle in sorted(entry.rectangles(), key=lambda one: one.source_index[0].start or 0):
        parts[rectangle.source].append(full[rectangle.shard_index])
    tensors = (part[0] if len(part) == 1 else torch.cat(part) for part in parts)
    return dict(zip(entry.hf, tensors, strict=True))


def stored_shapes(entry: WeightEntry, experts: int) -> dict[str, Shape]:
    """Name -> shape of the tensors that a folder has for `entry`; for a stacked entry, the one of all `experts`."""
    if entry.row.stack is None:
        return dict(zip(entry.hf, entry.shapes, strict=True))
    shape = entry.full_shape
    return {entry.stack_name: (experts, *(reversed(shape) if entry.row.stack.transposed else shape))}


def to_stored(entries: Sequence[WeightEntry], tensors: Iterable[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Megatron -> the tensors of a folder: from one entry and its whole tensor, or from one for each expert."""
    stack = entries[0].row.stack
    if stack is None:
        (entry,), (full,) = entries, tensors
        return to_hf(entry, full)
    whole: torch.Tensor | None = None
    ((name, shape),) = stored_shapes(entries[0], len(entries)).items()
    for expert, (entry, full) in enumerate(zip(entries, tensors, strict=True)):
        whole = full.new_empty(shape) if whole is None else whole
        rows, first_row = whole[expert].T if stack.transposed else whole[expert], 0
        for number, part in enumerate(to_hf(entry, full).values()):
            stop = first_row + part.shape[0]
            place = slice(number, None, len(entry.hf)) if stack.interleaved else slice(first_row, stop)
            rows[place].copy_(part)
            first_row = stop
    assert whole is not None
    return {name: whole}


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], arch: Architecture, folder: str | Path, place: Grid
) -> None:
    """Load every parameter of this rank's model chunks from a Hugging Face folder, cast to the parameter's dtype.

    Collectives: none. Memory besides the parameters: the mapped pages of one parameter's tensors. Raises ConfigError with
    every problem of the folder, not only those of this rank's slices, so all ranks refuse together. Raises ValueError if
    the model is not one of `arch` at `place`.
    """
    table = weight_table(arch)
    weights = HfWeights.open(folder, table)
    problems = weights.problems(table)
    if problems:
        raise ConfigError(problems)
    for chunk in model_chunks:
        for name, parameter in named_global_parameters(chunk, table.num_experts // place.expert * place.ep_rank):
            entry = table.by_name.get(name)
            if entry is None:
                raise ValueError(f"the weight table of family {arch.family} has no row for parameter {name}")
            rank, size = place.tp_rank, place.tensor
            if entry.expert is not None:
                rank, size = place.etp_rank, place.expert_tensor
            if tuple(parameter.shape) != entry.local_shape(size):
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}; {entry.local_shape(size)} by the weight table"
                )
            with torch.no_grad(), weights.slices(entry.hf) as sources:
                load_shard(parameter, entry, sources, rank, size)


def named_global_parameters(chunk: torch.nn.Module, first_expert: int = 0) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a GPTModel (or of wrappers around it). In their names layers are numbered over the whole model from
    0, and experts over the whole layer; `first_expert` is this rank's first."""
    while isinstance(wrapped := getattr(chunk, "module", None), torch.nn.Module):
        chunk = wrapped  # DDP's and Float16Module's wrappers
    for name, parameter in chunk.named_parameters():
        match = _LAYER_NAME.fullmatch(name)
        if match:
            number = chunk.get_submodule(MEGATRON_LAYER.format(i=match[1]).rstrip(".")).layer_number
            assert isinstance(number, int)  # megatron-core's, global, from 1
            rest = _EXPERT_NAME.sub(lambda found: f"{found[1]}{int(found[2]) + first_expert}{found[3]}", match[2])
            name = MEGATRON_LAYER.format(i=number - 1) + rest
        yield name, parameter
