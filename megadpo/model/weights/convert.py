"""Converts folders: Hugging Face -> Megatron checkpoint -> Hugging Face, tensor by tensor, in one process, without a model.

A Megatron checkpoint folder has `model/` (dist_checkpointing), `hf/` (copies of the Hugging Face folder's other files) and
`megadpo.json`. The target is written under another name and renamed, so it is complete or absent.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megadpo.config.problems import ConfigError, Problem
from megadpo.families import WeightEntry, WeightTable, read_architecture, weight_table
from megadpo.files.atomic import delete_left_over, in_use, write_then_rename
from megadpo.model.manifest import INFO_FILE, MANIFEST_FILE, damages, no_manifest, read_manifest, write_manifest
from megadpo.model.weights.carried import carried_tensors, keep_carried
from megadpo.model.weights.dist_folder import (
    MODEL_FOLDER,
    TENSOR_SUFFIX,
    DistFolder,
    PlannedTensor,
    Region,
    blocks_with,
    write_dist_folder,
)
from megadpo.model.weights.hf_folder import DTYPES, HfWeights
from megadpo.model.weights.hf_writer import MAX_FILE_BYTES, TensorSpec, write_hf_weights
from megadpo.model.weights.load import load_shard, stored_shapes, to_stored

LOG = logging.getLogger(__name__)
HF_FOLDER = "hf"
FORMAT = 1
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data")
TOKENIZER_FILES = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.json", "chat_template.jinja", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
}
NEEDED_FILES = {"config.json", "generation_config.json", *TOKENIZER_FILES}
TEMPLATES_FOLDER = "additional_chat_templates"
CARD_FILE = "README.md"


def is_megatron_folder(folder: str | Path) -> bool:
    """Whether the folder is a Megatron checkpoint of megadpo, possibly a damaged one, and not a Hugging Face folder."""
    return any((Path(folder) / name).is_file() for name in (INFO_FILE, MANIFEST_FILE))


def write_info(folder: str | Path, dtype: torch.dtype, step: int) -> None:
    """Write megadpo.json and manifest.json, the last files of a Megatron checkpoint folder. step: optimizer steps so far."""
    info = {"format": FORMAT, "dtype": dtype_name(dtype), "step": step, "manifest": True}
    (Path(folder) / INFO_FILE).write_text(json.dumps(info) + "\n", encoding="utf-8")
    write_manifest(Path(folder))


def keep_hf_files(source: str | Path, target: str | Path, own_files: Mapping[str, bytes] | None = None) -> None:
    """Fill a checkpoint's hf/, `target`, from the model folder `source`: `copy_hf_files`, and tensors that megadpo doesn't
    use (carried.py)."""
    copy_hf_files(source, target, own_files)
    keep_carried(source, target)


def copy_hf_files(source: str | Path, target: str | Path, own_files: Mapping[str, bytes] | None = None) -> None:
    """Copy all files of a Hugging Face folder except weights and hidden files to `target`, byte for byte. A link to a file
    outside the folder is left out, because that file may not be part of the model.

    own_files: name -> content of files that replace the folder's. If they include a tokenizer, none of the folder's
    tokenizer files is copied. If they include a card, the folder's cards are renamed: README.md to README.base.md,
    README.base.md to README.base.base.md.
    """
    source, target, own_files = Path(source), Path(target), own_files or {}
    for path in _other_files(source):
        name = path.relative_to(source).as_posix()
        of_tokenizer = name in TOKENIZER_FILES or name.startswith(f"{TEMPLATES_FOLDER}/")
        if CARD_FILE in own_files and re.fullmatch(r"README(\.base)*\.md", name):
            name = name.removesuffix(".md") + ".base.md"
        if not _leads_out(path, source) and not (of_tokenizer and own_files.keys() & TOKENIZER_FILES):
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    for name, content in own_files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def linked_out(folder: str | Path) -> list[Problem]:
    """A problem for each file that a checkpoint needs and that is a link out of the folder. (`copy_hf_files` leaves these
    out.)"""
    folder = Path(folder)
    expected = "a file in the model folder: checkpoints keep a copy, and links out of the folder are not copied"
    return [
        Problem(str(path), f"a link to {path.resolve()}", expected, f"cp --remove-destination {path.resolve()} {path}")
        for path in _other_files(folder)
        if path.parent == folder and path.name in NEEDED_FILES and _leads_out(path, folder)
    ]


def _other_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        name = path.name.removesuffix(".index.json")
        if path.is_file() and not hidden and not name.endswith(WEIGHT_SUFFIXES):
            yield path


def _leads_out(path: Path, folder: Path) -> bool:
    """Whether it is a link out of the folder. In the hub's cache, links from snapshots/<commit>/ to the model's blobs/ are
    allowed."""
    true, inside = path.resolve(), [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    return not any(true.is_relative_to(one) for one in inside)


def import_hf(hf: str | Path, megatron: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the Hugging Face folder `hf` as a Megatron checkpoint folder `megatron`, in `dtype`, or by default in the files'.

    Memory: the tensors of one layer and the mapped Hugging Face tensors being copied. Needs no process groups. Raises
    ConfigError with every problem of the folder, or if `megatron` exists and isn't empty.
    """
    table = weight_table(read_architecture(hf, "HF_FOLDER"))
    weights = HfWeights.open(hf, table)
    problems = weights.problems(table) + linked_out(hf) + target_problems(megatron)
    if problems:
        raise ConfigError(problems)
    with written_aside(megatron) as folder:
        write_dist_folder(folder / MODEL_FOLDER, _planned_tensors(weights, table, dtype), _empty_objects(table))
        keep_hf_files(hf, folder / HF_FOLDER)
        write_info(folder, dtype or weights.dtype(table.entries[0].hf), step=0)


def export_hf(
    megatron: str | Path, hf: str | Path, max_file_bytes: int = MAX_FILE_BYTES, *, dtype: torch.dtype | None = None
) -> None:
    """Write the Megatron checkpoint folder `megatron` as a Hugging Face folder `hf`, with the same bits, or rounded to
    `dtype`.

    Weights go to model.safetensors, or to files of at most `max_file_bytes` and an index; tied embeddings are written
    once. Memory: one Megatron tensor, and one saved shard of it twice. Needs no process groups. Raises ConfigError if
    `megatron` is not a complete undamaged checkpoint, or if `hf` exists and isn't empty.
    """
    megatron = Path(megatron)
    if problems := target_problems(hf) + source_problems(megatron):
        raise ConfigError(problems)
    manifest = read_manifest(megatron)
    if manifest is None:
        LOG.warning(no_manifest(megatron))
    elif not_whole := damages(megatron, manifest, blocks_with((), megatron, manifest)):
        raise ConfigError(not_whole)
    table = weight_table(read_architecture(megatron / HF_FOLDER, "RUN"))
    stored = DistFolder(megatron / MODEL_FOLDER)
    regions = stored.find(table.entries)
    if manifest is not None:
        blocks = blocks_with({region.key for region in regions}, megatron, manifest)
        if not_whole := damages(megatron, manifest, {n: b for n, b in blocks.items() if n.endswith(TENSOR_SUFFIX)}):
            raise ConfigError(not_whole)
    groups = list(_as_written(zip(table.entries, regions, strict=True)))
    specs = [
        TensorSpec(name, shape, _written_dtype(entry, region, dtype))
        for (entry, region), *others in groups
        for name, shape in stored_shapes(entry, 1 + len(others)).items()
    ]
    with written_aside(hf) as folder:
        tensors = (
            to_stored(
                [entry for entry, _ in group],
                (stored.read(region).to(_written_dtype(entry, region, dtype)) for entry, region in group),
            )
            for group in groups
        )
        others, their_tensors = carried_tensors(megatron / HF_FOLDER)
        write_hf_weights(folder, [*specs, *others], itertools.chain(tensors, their_tensors), max_file_bytes)
        copy_hf_files(megatron / HF_FOLDER, folder)
        correct_dtype(folder / "config.json", specs)


def source_problems(megatron: Path) -> list[Problem]:
    """Why `megatron` is no Megatron checkpoint folder; empty if it is one."""
    if is_megatron_folder(megatron):
        return []
    fix = "give a folder that megadpo import or a training run has finished writing"
    steps = [folder for folder in megatron.glob("step_*") if is_megatron_folder(folder)]
    if steps:
        fix = f"name one of the checkpoints in it, such as {max(steps, key=lambda one: (len(one.name), one.name))}"
    return [Problem(str(megatron), f"no {INFO_FILE}", "a Megatron checkpoint folder", fix)]


Held = tuple[WeightEntry, Region]


def _as_written(held: Iterable[Held]) -> Iterator[list[Held]]:
    """Groups of what becomes one tensor: single entries, and the entries of all experts whose folders stack them."""
    for name, group in itertools.groupby(held, key=lambda one: one[0].stack_name):
        if name:
            yield list(group)
        else:
            yield from ([one] for one in group)


def _written_dtype(entry: WeightEntry, region: Region, dtype: torch.dtype | None) -> torch.dtype:
    return region.dtype if dtype is None or entry.row.frozen else dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name in config.json, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype of this name. Raises ValueError for one that models' safetensors files don't have."""
    for dtype in DTYPES.values():
        if dtype_name(dtype) == name:
            return dtype
    raise ValueError(f"{name!r} is not one of {', '.join(map(dtype_name, DTYPES.values()))}")


def _planned_tensors(weights: HfWeights, table: WeightTable, dtype: torch.dtype | None) -> Iterator[PlannedTensor]:
    """As in megatron-core's default, the experts of a parameter are stacked into one tensor, and so are equal layers. Each
    layer has a file, and so have embedding and head."""
    names: dict[str, list[str]] = {}
    for entry in table.entries:
        names.setdefault(entry.checkpoint_key, []).extend(entry.hf)
    end_files = itertools.count(table.num_layers)
    for entry in table.entries:
        key, shape = entry.checkpoint_key, entry.full_shape
        stored_dtype = weights.dtype(names[key]) if dtype is None or entry.row.frozen else dtype
        read = functools.partial(_read, weights, entry, stored_dtype)
        zeros = (0,) * len(shape)
        file = next(end_files) if entry.layer is None else entry.layer
        size, offset = (*table.stack_shape(entry), *shape), (*entry.index(key), *zeros)
        chunk = (*(1 for _ in entry.index(key)), *shape)
        yield PlannedTensor(key, size, offset, chunk, stored_dtype, file, read)


def _empty_objects(table: WeightTable) -> Iterator[str]:
    """The key of each linear layer's `_extra_state`: ShardedObject.unique_key in megatron-core's mapping.py."""
    for entry in table.entries:
        if entry.extra_state_key is not None:
            index, sizes = entry.index(entry.checkpoint_key) or (0,), table.stack_shape(entry) or (1,)
            offset, shape = (".".join(map(str, numbers)) for numbers in (index, sizes))
            yield f"{entry.extra_state_key}/shard_{offset}_{shape}"


def _read(weights: HfWeights, entry: WeightEntry, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.empty(entry.full_shape, dtype=dtype)
    with weights.slices(entry.hf) as sources:
        load_shard(tensor, entry, sources)
    return tensor


def correct_dtype(config: Path, specs: list[TensorSpec]) -> None:
    """Correct config.json if it has another dtype than the written weights, or a quantisation (weights are written without
    one)."""
    raw: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    written = {dtype_name(spec.dtype) for spec in specs}
    wrong = [key for key in ("dtype", "torch_dtype") if raw.get(key) not in (None, *written)]
    quantised = raw.pop("quantization_config", None)
    if quantised is not None:
        LOG.warning(f"the weights are written in {dtype_name(specs[0].dtype)}, not as {quantised.get('quant_method')}")
    if wrong or quantised is not None:
        raw.update({key: dtype_name(specs[0].dtype) for key in wrong})
        config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def target_problems(folder: str | Path) -> list[Problem]:
    """Why `folder` can't be written; empty if it can."""
    folder = Path(folder)
    if (folder.is_dir() and not any(folder.iterdir())) or not folder.exists():
        return []
    return [Problem(str(folder), "something there already", "a folder that is empty or not there", "name another")]


@contextlib.contextmanager
def written_aside(target: str | Path) -> Iterator[Path]:
    """`write_then_rename` of a folder, after `delete_left_over` of it; what stays is logged. Raises ConfigError if it can't
    be created."""
    target = Path(target).absolute()
    for path in delete_left_over(target):
        LOG.warning(f"{path}: another process writes there now, or was killed: then delete it")
    with write_then_rename(target) as aside:
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                Problem(str(target), str(error), "a place that can be written", "name another")
            ) from error
        with in_use(aside):
            yield aside
