"""Reads the pickles of a checkpoint as data only. A file that asks for anything else is refused, and none of it is executed.

torch's readers call `pickle.load` on .metadata and on objects among the tensors. A pickle can call any function of any
installed module.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from megadpo.config.problems import ConfigError, Problem

METADATA_FILE = ".metadata"
FIX = "use a folder that megadpo import or a training run has finished writing"
_DCP = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_METADATA_CLASSES = {
    f"{_DCP}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    _MEGATRON: {"MCoreMetadata", "MCoreSavePlan"},  # versions before 0.16 wrote them
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},  # a layout by its name; raises KeyError for another name
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
}
_RNG_CLASSES: list[Any] = [
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
"""Classes of NumPy's random-number state, with their names in NumPy 1 and 2."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs; none of it was executed")


def read_metadata(folder: Path) -> Metadata:
    """Shapes, dtypes and places of the tensors of a dist_checkpointing folder. Raises ConfigError for a file that is absent
    or broken, or asks for other classes than such a file needs."""
    file = folder / METADATA_FILE
    try:
        with file.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds {type(metadata).__name__}")
        if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
            raise TypeError("it doesn't say where the tensors are")
        for place in metadata.storage_data.values():
            if PurePosixPath(place.relative_path).name != place.relative_path:
                raise ValueError(f"it names {place.relative_path!r}, which is no file of this folder")
    except Exception as error:  # a broken pickle may raise any exception
        raise _refusal(file, error, f"a checkpoint of megatron-core, with a file {METADATA_FILE}") from error
    metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
    return metadata


class MetadataGiven(dcp.FileSystemReader):
    """torch's reader of tensors, with the metadata from `read_metadata`."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:  # without torch's **kwargs, so that torch looks for no other file to unpickle
        return self._metadata


def read_data(file: Path | IO[bytes], name: str | Path) -> Any:
    """Reads a file of torch.save to the CPU: numbers, texts, tensors, lists, tuples and dicts of these, and NumPy's
    random-number state. name: the file's name for messages. Raises ConfigError for a file that is absent or broken, or has
    anything else."""
    try:
        with torch.serialization.safe_globals(_RNG_CLASSES):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # as above
        raise _refusal(name, error, "a file of numbers, texts and tensors, as checkpoints have") from error


def _refusal(file: Path | str, error: Exception, expected: str) -> ConfigError:
    message = str(error)
    if "WeightsUnpickler error:" in message:  # drop torch's advice to load without this check
        message = message.partition("WeightsUnpickler error:")[2]
    reason = (message.strip().splitlines() or [""])[0].partition(" Please use")[0]
    return ConfigError(Problem(str(file), f"{type(error).__name__}: {reason}", expected, FIX))
