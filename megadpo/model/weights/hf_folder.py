"""Reads the weights of a Hugging Face folder: finds the file of each tensor, and reads parts of tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megadpo.config.problems import ConfigError, Problem
from megadpo.families.layouts import Shape
from megadpo.families.weight_table import WeightEntry, WeightTable

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS_COMPARED = 4096
HARMLESS_ENDINGS = ("rotary_emb.inv_freq", "attn.masked_bias")
"""Buffers that old versions of transformers saved with the weights. They are computed, not trained, and transformers ignores
them too."""

_ASK_AGAIN = "download or copy the folder again"


class Sliceable(Protocol):
    """A tensor, or safetensors' PySafeSlice, which reads only the indexed part."""

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, by its file's header."""

    file: Path
    shape: Shape
    dtype: str
    """safetensors' name, such as BF16."""
    inside: Inside | None = None
    """Its place, if it is only a part of a tensor of the file."""


@dataclass(frozen=True)
class Inside:
    """One expert's part of a tensor [E, ...] of all experts: every `step`th row from `first_row` on. With expert None: the
    whole tensor `name`."""

    name: str
    expert: int | None
    first_row: int
    step: int = 1
    transposed: bool = False
    """Its rows are the last axis."""
    scales: StoredTensor | None = None
    """For a tensor in MXFP4: the exponents of its blocks."""


class _Part:
    """Reads slices of such a part from the file's tensor."""

    def __init__(self, whole: Any, inside: Inside, rows: int, scales: Any = None) -> None:
        self._whole, self._inside, self._rows, self._scales = whole, inside, rows, scales

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        inside = self._inside
        assert inside.expert is not None
        start, stop, _ = index[0].indices(self._rows)
        last = inside.first_row + (stop - 1) * inside.step
        rows = slice(inside.first_row + start * inside.step, last + 1, inside.step)
        expert, others = slice(inside.expert, inside.expert + 1), index[1:]
        part: torch.Tensor
        if inside.scales is not None:
            part = from_mxfp4(self._whole[(expert, rows)][0], self._scales[(expert, rows)][0])
            return part[(slice(None), *others)]
        if inside.transposed:
            (columns,) = others or (slice(None),)
            part = self._whole[(expert, columns, rows)]
            return part[0].T
        part = self._whole[(expert, rows, *others)]
        return part[0]


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks uint8 [R, B, 16], each with two 4-bit numbers, the lower bits first; scales uint8 [R, B]: 127 + the exponent of 2
    for 32 numbers -> bfloat16 [R, 32 B], which is exact (OCP Microscaling Formats v1.0, 5.3)."""
    numbers = torch.stack((blocks & 15, blocks >> 4), -1).flatten(1)
    table = torch.tensor(_FP4 + tuple(-x for x in _FP4), dtype=torch.bfloat16)
    exponents = (scales.to(torch.int32) - 127).repeat_interleave(32, 1)
    return torch.ldexp(table[numbers.flatten(1).int()], exponents)


_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""4-bit numbers by exponent and mantissa. With the highest bit set they are negative."""


@dataclass(frozen=True)
class HfWeights:
    """The safetensors files of a folder, by their headers. A tensor is read only when it is used."""

    folder: Path
    tensors: Mapping[str, StoredTensor] = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, table: WeightTable | None = None) -> HfWeights:
        """Read every file's header. Raises ConfigError with every file that is missing, broken or truncated.

        table: the model's. Then a tensor of all experts of a layer appears as one tensor for each expert. (Folders of the
        hub and of save_pretrained have single experts; transformers 5 has all experts in one tensor in memory, and writes
        them so with save_original_format=False.)
        """
        folder = Path(folder)
        tensors: dict[str, StoredTensor] = {}
        problems: list[Problem] = []
        indexed = _indexed_names(folder)
        for file, names in indexed.items():
            found, problem = _read_header(folder / file)
            problems += [problem] if problem else []
            tensors.update(found if names is None else {name: found[name] for name in names if name in found})
            if names is not None and not problem:
                problems += [_missing(folder / file, name) for name in names if name not in found]
        if problems:
            raise ConfigError(problems)
        return cls(folder, tensors if table is None else _as_in_table(tensors, table))

    def problems(self, table: WeightTable) -> list[Problem]:
        """Every difference between these tensors and those of `table`: missing, of another shape, unused; and a head that
        differs from the embedding although they are tied."""
        wanted, stacks = table.hf_shapes, table.stacks
        missing = dict.fromkeys(stacks.get(name, name) for name in wanted if name not in self.tensors)
        problems = [_missing(self.folder, name) for name in missing]
        carried = frozenset(self.carried(table))
        for name, tensor in self.tensors.items():
            if name in carried:
                continue
            where = f"{tensor.file}: {name}"
            if name in wanted and tensor.shape != wanted[name]:
                fix = "config.json and the weights come from different models: take both from the same one"
                problems.append(Problem(where, tensor.shape, f"shape {wanted[name]}, by config.json", fix))
            elif name in wanted and tensor.dtype not in DTYPES:
                fix = "use the unquantised model"
                problems.append(Problem(where, tensor.dtype, f"a dtype among {', '.join(DTYPES)}", fix))
            elif name not in wanted and not name.endswith(HARMLESS_ENDINGS) and name not in (table.tied or ()):
                fix = "use a model whose weights are those of its config.json (no adapters, no quantisation)"
                problems.append(Problem(where, "a tensor that nothing uses", "only the weights of the model", fix))
        return problems + self._untied_head(table)

    def carried(self, table: WeightTable) -> list[str]:
        """The tensors that exports keep unchanged (carried.py)."""
        wanted = table.hf_shapes
        found = (name for name in self.tensors if any(fnmatchcase(name, one) for one in table.carried))
        return [name for name in found if name not in wanted]

    def _untied_head(self, table: WeightTable) -> list[Problem]:
        """The folder of a tied model may have a head too, if it equals the embedding. (transformers doesn't tie them if they
        differ.) Reads both, a few rows at a time."""
        if table.tied is None or not self.tensors.keys() >= set(table.tied):
            return []
        embedding, head = (self.tensors[name] for name in table.tied)
        if embedding.shape == head.shape:
            dtype = self.dtype(table.tied)
            with self.slices(table.tied) as sources:
                starts = range(0, head.shape[0], ROWS_COMPARED)
                rows = ((slice(start, start + ROWS_COMPARED),) for start in starts)
                if all(torch.equal(*(source[index].to(dtype) for source in sources)) for index in rows):
                    return []
        expected = f"the same as {table.tied[0]}, or not there: config.json says tie_word_embeddings"
        fix = "set tie_word_embeddings to false in config.json if the model has a head of its own"
        return [Problem(f"{head.file}: {table.tied[1]}", "another tensor", expected, fix)]

    def dtype(self, names: Sequence[str]) -> torch.dtype:
        """The dtype that can hold all of these tensors exactly; usually it is their dtype."""
        dtype = DTYPES[self.tensors[names[0]].dtype]
        for name in names[1:]:
            dtype = torch.promote_types(dtype, DTYPES[self.tensors[name].dtype])
        return dtype

    @contextlib.contextmanager
    def slices(self, names: Sequence[str]) -> Iterator[list[Sliceable]]:
        """Slices of these tensors, valid inside the block.

        Each call maps the files again. Pages that were read count as this process's memory until the mapping ends, so an
        open file would in the end take its whole size.
        """
        with contextlib.ExitStack() as stack:
            stored = [self.tensors[name] for name in names]
            scales = (one.inside.scales for one in stored if one.inside is not None)
            files = {one.file for one in (*stored, *scales) if one is not None}
            handles: dict[Path, Any] = {f: stack.enter_context(safe_open(f, "pt", device="cpu")) for f in files}
            yield [self._slice(handles, name) for name in names]

    def _slice(self, handles: Mapping[Path, Any], name: str) -> Sliceable:
        stored = self.tensors[name]
        handle = handles[stored.file]
        if stored.inside is None:
            part: Sliceable = handle.get_slice(name)
            return part
        whole: Sliceable = handle.get_slice(stored.inside.name)
        if stored.inside.expert is None:
            return whole
        scales = stored.inside.scales
        of_scales = scales and handles[scales.file].get_slice(f"{stored.inside.name.removesuffix('_blocks')}_scales")
        return _Part(whole, stored.inside, stored.shape[0], of_scales)


def _as_in_table(tensors: dict[str, StoredTensor], table: WeightTable) -> dict[str, StoredTensor]:
    """`tensors` by the table's names: a tensor with an alternative name gets the first one, and a tensor of all experts
    becomes one for each expert, if its shape fits."""
    apart = dict(tensors)
    for entry in table.entries:
        for name, other in entry.also.items():
            if name not in tensors and other in tensors:
                stored = apart.pop(other)
                apart[name] = dataclasses.replace(stored, inside=Inside(other, None, 0))
        if entry.stack_name:
            _take_apart(apart, tensors, entry, table.num_experts)
        whole = tensors.get(entry.hf_stacked)
        if whole is None or whole.shape != (table.num_experts, *entry.full_shape):
            continue  # a tensor of another shape stays, and is reported as unused
        apart.pop(entry.hf_stacked, None)
        first_row = 0
        for name, part in zip(entry.hf, entry.shapes, strict=True):
            inside = Inside(entry.hf_stacked, entry.expert, first_row)
            apart[name] = StoredTensor(whole.file, part, whole.dtype, inside)
            first_row += part[0]
    return apart


def _take_apart(
    apart: dict[str, StoredTensor], tensors: Mapping[str, StoredTensor], entry: WeightEntry, experts: int
) -> None:
    """Adds the tensors of one expert's `entry` to `apart`. They are in a tensor of all experts, possibly in MXFP4."""
    stack, shape = entry.row.stack, entry.full_shape
    assert stack is not None
    whole, scales = tensors.get(entry.stack_name), tensors.get(f"{entry.stack_name}_scales")
    form = Inside(entry.stack_name, entry.expert, 0, transposed=stack.transposed)
    wanted: Shape = (experts, *(reversed(shape) if stack.transposed else shape))
    if whole is None and scales is not None:
        whole = tensors.get(f"{entry.stack_name}_blocks")
        form = Inside(f"{entry.stack_name}_blocks", entry.expert, 0, scales=scales)
        wanted = (experts, shape[0], shape[-1] // 32, 16)
        if scales.shape != wanted[:3] or scales.dtype != "U8" or (whole is not None and whole.dtype != "U8"):
            return
    if whole is None or whole.shape != wanted:
        return  # a tensor of another shape stays, and is reported as unused
    for name in (form.name, f"{entry.stack_name}_scales"):
        apart.pop(name, None)
    dtype = whole.dtype if form.scales is None else "BF16"
    first_row = 0
    for number, (name, part) in enumerate(zip(entry.hf, entry.shapes, strict=True)):
        first, step = (number, len(entry.hf)) if stack.interleaved else (first_row, 1)
        apart[name] = StoredTensor(whole.file, part, dtype, dataclasses.replace(form, first_row=first, step=step))
        first_row += part[0]


def _indexed_names(folder: Path) -> dict[str, list[str] | None]:
    """File name -> its tensors by the index; None: all of its tensors. A single file comes first, as in transformers."""
    if (folder / SINGLE_FILE).exists():
        return {SINGLE_FILE: None}
    if (folder / INDEX_FILE).exists():
        try:
            weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
            files: dict[str, list[str] | None] = {file: [] for file in sorted(set(weight_map.values()))}
            outside = [file for file in files if Path(file).is_absolute() or ".." in Path(file).parts]
            if outside:
                raise ValueError(f"{outside[0]!r} is not in this folder")
            for name, file in weight_map.items():
                names = files[file]
                assert names is not None
                names.append(name)
            return files
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = 'JSON with a "weight_map" from tensor to a file of this folder'
            raise ConfigError(Problem(str(folder / INDEX_FILE), str(error), expected, _ASK_AGAIN)) from error
    if not folder.is_dir():
        fix = "give a folder in Hugging Face format"
        raise ConfigError(Problem("policy.model_name", str(folder), "an existing folder", fix))
    others = sorted(
        p.name for p in folder.iterdir() if p.name.startswith("pytorch_model") or p.suffix == ".safetensors"
    )
    fix = _ASK_AGAIN
    if any(name.startswith("pytorch_model") for name in others):
        fix = "convert it: AutoModelForCausalLM.from_pretrained(OLD, dtype='auto').save_pretrained(NEW)"
    raise ConfigError(Problem(str(folder), others or "no weight files", f"{SINGLE_FILE} or {INDEX_FILE}", fix))


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], Problem | None]:
    if not file.exists():
        return {}, Problem(str(file), "no such file", f"the file that {INDEX_FILE} names", _ASK_AGAIN)
    try:
        with safe_open(file, "pt", device="cpu") as handle:
            found = {}
            names = handle.keys()  # not iterable itself
            for name in names:
                part = handle.get_slice(name)
                found[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
            return found, None
    except (SafetensorError, OSError) as error:
        return {}, Problem(str(file), str(error), "a whole safetensors file", _ASK_AGAIN)


def _missing(where: Path, name: str) -> Problem:
    return Problem(str(where), "no such tensor", name, _ASK_AGAIN + ", or check that config.json belongs to it")
