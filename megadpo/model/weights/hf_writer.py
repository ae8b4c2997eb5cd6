"""Writes a Hugging Face folder's weights, tensor by tensor.

safetensors' save needs all tensors of a file in memory, and a file may have 5 GB.
Format: https://huggingface.co/docs/safetensors (8 bytes with the header's length, JSON header, then the tensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from megadpo.families.layouts import Shape
from megadpo.model.weights.hf_folder import DTYPES, INDEX_FILE, SINGLE_FILE

MAX_FILE_BYTES = 5 * 10**9
"""transformers' default shard size up to version 4: 5 GB of 10^9 bytes."""
_HEADER_ALIGNMENT_BYTES = 8
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_hf_weights(
    folder: Path,
    specs: Iterable[TensorSpec],
    tensors: Iterable[Mapping[str, torch.Tensor]],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `specs` to model.safetensors, or to files of at most `max_file_bytes` and their index.

    tensors: the same tensors in groups. One group is in memory at a time.
    """
    files = _plan_files(list(specs), max_file_bytes)
    weight_map = {spec.name: file for file, members in files.items() for spec in members}
    if len(files) > 1:
        total = sum(spec.num_bytes for members in files.values() for spec in members)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    offsets: dict[str, int] = {}
    for file, members in files.items():
        with (folder / file).open("wb") as stream:
            _write_header(stream, members, offsets)
    planned = {spec.name: spec for members in files.values() for spec in members}
    for group in tensors:
        for name, tensor in group.items():
            spec = planned.pop(name)
            if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
                raise ValueError(f"{name}: planned {spec}, got {tuple(tensor.shape)} {tensor.dtype}")
            with (folder / weight_map[name]).open("r+b") as stream:
                stream.seek(offsets[name])
                # As bytes, without a copy: numpy has no bfloat16.
                stream.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        del group, tensor  # before the next group is read
    if planned:
        raise ValueError(f"planned but never written: {', '.join(planned)}")


def _plan_files(specs: list[TensorSpec], max_file_bytes: int) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in order. A tensor over the limit has its own file."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _write_header(stream: BinaryIO, members: list[TensorSpec], offsets: dict[str, int]) -> None:
    """Write the header, add each tensor's position in the file to `offsets`, and give the file its full length."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    # Wide dtypes first, as in safetensors' save: so every tensor begins at a multiple of its item size.
    for spec in sorted(members, key=lambda spec: -spec.dtype.itemsize):
        starts[spec.name] = position
        ends = [position, position + spec.num_bytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
        position = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    stream.write(len(text).to_bytes(8, "little") + text)
    begin = stream.tell()
    offsets.update({name: begin + start for name, start in starts.items()})
    stream.truncate(begin + position)
