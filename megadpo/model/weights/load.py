"""Hugging Face weights into the parameters of a megatron-core model, each rank reading only its own slices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError
from megadpo.model.weights.hf_folder import HfWeights
from megadpo.model.weights.tables import MEGATRON_LAYER, weight_table

_LAYER_NAME = re.compile(re.escape(MEGATRON_LAYER).replace(r"\{i\}", r"(\d+)") + "(.*)")


def load_hf_weights(
    model_chunks: Sequence[torch.nn.Module], arch: Architecture, folder: str | Path, *, tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of this rank's model chunks from a Hugging Face folder, casting to the parameter's dtype.

    Collectives: none. Memory beyond the parameters: the mapped pages of the tensors in one parameter.
    Raises ConfigError with every problem of the folder, not only those of this rank's slices: all ranks of a run
    refuse together. Raises ValueError where the model is not one of `arch` at `tp_size`.
    """
    weights = HfWeights.open(folder)
    table = weight_table(arch)
    problems = weights.problems(table)
    if problems:
        raise ConfigError(problems)
    for chunk in model_chunks:
        for name, parameter in named_global_parameters(chunk):
            entry = table.by_name.get(name)
            if entry is None:
                raise ValueError(f"the weight table of family {arch.family} has no row for parameter {name}")
            if tuple(parameter.shape) != entry.local_shape(tp_size):
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}; {entry.local_shape(tp_size)} by the weight table"
                )
            with torch.no_grad(), weights.slices(entry.hf) as sources:
                entry.fill(parameter, sources, tp_rank, tp_size)


def named_global_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of a GPTModel (or of wrappers around it), layers numbered over the whole model from 0."""
    while isinstance(wrapped := getattr(chunk, "module", None), torch.nn.Module):
        chunk = wrapped  # DDP's and Float16Module's wrappers
    for name, parameter in chunk.named_parameters():
        match = _LAYER_NAME.fullmatch(name)
        if match:
            number = chunk.get_submodule(MEGATRON_LAYER.format(i=match[1]).rstrip(".")).layer_number
            assert isinstance(number, int)  # megatron-core's, global, from 1
            name = MEGATRON_LAYER.format(i=number - 1) + match[2]
        yield name, parameter
