"""Reads and writes the weights in a folder of megatron-core's dist_checkpointing (torch_dist), in one process.

The format is that of torch.distributed.checkpoint, with the keys of GPTModel.sharded_state_dict(). Tensors are read and
written one by one, without a model. (megatron-core's load and save need all of them in memory, and process groups.)
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megadpo.config.problems import ConfigError, Problem
from megadpo.families.layouts import Shape
from megadpo.families.weight_table import WeightEntry
from megadpo.model.manifest import BLOCK_BYTES, Manifest, damage_of
from megadpo.model.weights.safe_files import FIX, METADATA_FILE, MetadataGiven, read_metadata

MODEL_FOLDER, COMMON_FILE, TENSOR_SUFFIX = "model", "common.pt", ".distcp"


@dataclass(frozen=True)
class Region:
    """The part of a stored tensor that is one Megatron parameter."""

    key: str
    index: tuple[int, ...]
    """Its index in the leading dimensions, if the stored tensor has all layers, all experts, or both."""
    shape: Shape
    """Shape of the parameter, without these dimensions."""
    dtype: torch.dtype


class DistFolder:
    """Reads single tensors of a dist_checkpointing folder of any layout."""

    def __init__(self, folder: str | Path) -> None:
        """Reads only the metadata. Raises ConfigError if the folder is another one, or not finished."""
        self.folder = Path(folder)
        metadata = read_metadata(self.folder)
        self._reader = MetadataGiven(self.folder, metadata)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: Mapping[str, TensorStorageMetadata] = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def find(self, entries: Iterable[WeightEntry]) -> list[Region]:
        """The place of each entry. Raises ConfigError with every tensor that is missing or has another shape."""
        regions: list[Region] = []
        problems: list[Problem] = []
        for entry in entries:
            region = self._find(entry)
            if region is None:
                problems.append(Problem(str(self.folder), "no such tensor", " or ".join(entry.names), FIX))
            elif region.shape != entry.full_shape:
                expected = f"shape {entry.full_shape}, by hf/config.json"
                problems.append(Problem(f"{self.folder}: {region.key}", region.shape, expected, FIX))
            else:
                regions.append(region)
        if problems:
            raise ConfigError(problems)
        return regions

    def _find(self, entry: WeightEntry) -> Region | None:
        """megatron-core stacks the layers into one tensor, or (`non_homogeneous_layers`) has a key for each. The experts of a
        layer are always stacked."""
        for key in entry.checkpoint_keys:
            stored = self._tensors.get(key)
            if stored is None:
                continue
            index = entry.index(key)
            if all(number < size for number, size in zip(index, stored.size, strict=False)):
                return Region(key, index, tuple(stored.size[len(index) :]), stored.properties.dtype)
        return None

    def region(self, key: str, index: tuple[int, ...]) -> Region:
        """The place of the tensor `key`, at `index` of its leading dimensions. Raises ConfigError if there is none."""
        stored = self._tensors.get(key)
        if stored is None:
            raise ConfigError(Problem(str(self.folder), "no such tensor", key, FIX))
        return Region(key, index, tuple(stored.size[len(index) :]), stored.properties.dtype)

    def read(self, region: Region) -> torch.Tensor:
        """The whole parameter, as a new tensor. Memory: that, and (in torch.load) one saved shard of it twice.

        Raises ConfigError if a file is missing, truncated or broken.
        """
        where = f"{self.folder}: {region.key}"
        target = torch.empty(region.shape, dtype=region.dtype)
        shape = (1,) * len(region.index) + region.shape
        offset = region.index + (0,) * len(region.shape)
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        items = create_read_items_for_chunk_list(region.key, self._tensors[region.key], [chunk])
        found = sum(math.prod(item.lengths) for item in items)
        if found != target.numel():
            raise ConfigError(Problem(where, f"{found} numbers", f"{target.numel()} numbers", FIX))
        try:
            self._reader.read_data(dcp_planner.LoadPlan(items), _OneTensor(target.view(shape))).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(Problem(where, str(error), "readable .distcp files", FIX)) from error
        return target


def blocks_with(keys: Collection[str], checkpoint: Path, manifest: Manifest) -> dict[str, list[int]]:
    """File -> numbers of its blocks, for manifest.damages: in tensor files the blocks with parts of the tensors `keys`; in
    other files all blocks. Raises ConfigError for a damaged .metadata, which has the tensors' places."""
    if damage := damage_of(checkpoint, manifest, f"{MODEL_FOLDER}/{METADATA_FILE}"):
        raise ConfigError(damage)
    blocks = {name: set(range(len(p.xxh3))) for name, p in manifest.items() if not name.endswith(TENSOR_SUFFIX)}
    for index, place in read_metadata(checkpoint / MODEL_FOLDER).storage_data.items():
        name = f"{MODEL_FOLDER}/{place.relative_path}"
        if index.fqn in keys and name in manifest:
            first, last = place.offset // BLOCK_BYTES, (place.offset + place.length - 1) // BLOCK_BYTES
            blocks.setdefault(name, set()).update(range(first, last + 1))
    return {name: sorted(numbers) for name, numbers in blocks.items()}


class _OneTensor(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: dcp_planner.ReadItem) -> torch.Tensor:
        start, lengths = read_item.dest_offsets, read_item.lengths
        return self._target[tuple(slice(a, a + n) for a, n in zip(start, lengths, strict=True))]


@dataclass(frozen=True)
class PlannedTensor:
    """A chunk to be written. Shapes are those of the checkpoint, with the dimension of layers."""

    key: str
    size: Shape
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    chunk: Shape
    dtype: torch.dtype
    file: int
    """Chunks with the same number are in one file, and are in memory together while it is written."""
    read: Callable[[], torch.Tensor]
    """Returns the chunk, in any shape with as many elements; called when it is written."""


def write_dist_folder(folder: str | Path, tensors: Iterable[PlannedTensor], empty_objects: Iterable[str]) -> None:
    """Write a checkpoint that `megatron.core.dist_checkpointing.load` reads in any layout. Collectives: none.

    empty_objects: keys (each for one layer) of ShardedObjects with the value None that a model asks for. Memory: the
    tensors of one file. Raises what reading and writing raise.
    """
    # Imported here, because it takes seconds and reading doesn't need it.
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    folder = Path(folder)
    folder.mkdir(parents=True)
    planner = _StreamingPlanner(list(tensors), list(empty_objects))
    writer = _FilePerNumber(folder, planner.file_of)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist says so
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # a BaseException around the cause
        raise error.failures[0][0] from None
    torch.save({}, folder / COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


class _StreamingPlanner(DefaultSavePlanner):
    """Plans tensors that don't exist yet, and reads each when the writer asks for it."""

    def __init__(self, tensors: list[PlannedTensor], empty_objects: list[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = {MetadataIndex(t.key, t.offset): t for t in tensors}
        self._objects = [MetadataIndex(key) for key in empty_objects]

    def create_local_plan(self) -> dcp_planner.SavePlan:
        items = [_write_item(index, tensor) for index, tensor in self._tensors.items()]
        items += [dcp_planner.WriteItem(index, dcp_planner.WriteItemType.BYTE_IO) for index in self._objects]
        self.plan = dcp_planner.SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: dcp_planner.WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == dcp_planner.WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)  # megatron-core saves lists: one object for each shard in the process
            return content
        planned = self._tensors[write_item.index]
        return planned.read().view(planned.chunk)

    def file_of(self, item: dcp_planner.WriteItem) -> int:
        return self._tensors[item.index].file if item.index in self._tensors else 0


class _FilePerNumber(dcp.FileSystemWriter):
    """Writes a file for each number. (torch's writer makes one file for a process, with all its tensors in memory.)"""

    def __init__(self, folder: Path, file_of: Callable[[dcp_planner.WriteItem], int]) -> None:
        super().__init__(folder)
        self._file_of = file_of

    def write_data(self, plan: dcp_planner.SavePlan, planner: dcp_planner.SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number in sorted({self._file_of(item) for item in plan.items}):
            items = [item for item in plan.items if self._file_of(item) == number]
            prefix = dataclasses.replace(plan.storage_data, prefix=f"__{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=prefix)
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _write_item(index: MetadataIndex, tensor: PlannedTensor) -> dcp_planner.WriteItem:
    data = dcp_planner.TensorWriteData(
        chunk=ChunkStorageMetadata(torch.Size(tensor.offset), torch.Size(tensor.chunk)),
        properties=TensorProperties(dtype=tensor.dtype),
        size=torch.Size(tensor.size),
    )
    return dcp_planner.WriteItem(index=index, type=dcp_planner.WriteItemType.SHARD, tensor_data=data)
