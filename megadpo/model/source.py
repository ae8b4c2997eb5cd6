"""Finds the files of a model: a Hugging Face folder, a hub name, or a Megatron checkpoint folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megadpo.config.problems import ConfigError, Problem, first_line
from megadpo.config.regular_files import require_regular_files
from megadpo.config.schema import Config
from megadpo.model.manifest import INFO_FILE, MANIFEST_FILE, small_files, verify

_TERMS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
_SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "README.md", *_TERMS)
"""Files of a hub model without weights. Checkpoints keep its card and terms of use."""

_SAMPLES, _SAMPLE_BYTES = 32, 2048
_TENSOR_SAMPLES, _TENSOR_SAMPLE_BYTES = 2, 1024


@dataclass(frozen=True)
class ModelSource:
    """The folders of a model."""

    hf_files: Path
    """Has config.json and tokenizer files, and if `megatron` is None the weights."""
    megatron: Path | None
    """Checkpoint folder (with model/ and hf/) that has the weights, or None."""
    from_hub: bool = False
    """`hf_files` is a folder of the hub's cache. Without a download of the weights it may have all, some or none of them."""


def resolve_source(name: str, field: str, *, weights: bool = True) -> ModelSource:
    """Find the model `name`. A hub name is downloaded, or found in the hub's local cache. weights: whether its safetensors
    are downloaded too.

    Raises ConfigError with `field` if there is no such folder or model, and with each damaged file of a Megatron checkpoint
    that is read before its tensors.
    """
    folder = Path(name)
    require_regular_files(folder, field)
    if (folder / MANIFEST_FILE).is_file() or ((folder / INFO_FILE).is_file() and (folder / "hf").is_dir()):
        verify(folder, small_files)
        return ModelSource(hf_files=folder / "hf", megatron=folder)
    if folder.is_dir():
        return ModelSource(hf_files=folder, megatron=None)
    expected = "a Hugging Face folder or hub name, or a Megatron checkpoint folder"
    if folder.is_file():
        raise ConfigError([Problem(field, name, f"{expected}; this is a file", "name the folder it is in")])
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError([Problem(field, name, f"{expected}; there is no such folder", "correct the path")])
    return ModelSource(hf_files=_from_hub(name, field, expected, weights), megatron=None, from_hub=True)


def reference_source(cfg: Config, policy_source: ModelSource, *, weights: bool = True) -> ModelSource:
    """The reference's model: `dpo.reference.model_name`, or the policy's starting model. weights: as in
    `resolve_source`."""
    if cfg.dpo.reference.model_name is None:
        return policy_source
    return resolve_source(cfg.dpo.reference.model_name, "dpo.reference.model_name", weights=weights)


def weights_fingerprint(source: ModelSource, *, every_tensor: bool = False) -> str:
    """sha256 of the sizes of the weight files and of samples of their bytes. It differs between models of one architecture,
    and is the same for a copy of the folder under any name. Only the samples are read.

    every_tensor: also sample each tensor, because a run that trains only routers, norms or a few layers changes no others.
    """
    files = source.hf_files.glob("*.safetensors") if source.megatron is None else source.megatron.glob("model/*.distcp")
    inside = _tensors_by_file(source.megatron / "model") if every_tensor and source.megatron is not None else {}
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        places = [(size * sample // _SAMPLES, _SAMPLE_BYTES) for sample in range(_SAMPLES)]
        if every_tensor:
            tensors = inside.get(path.name, []) if source.megatron is not None else _tensors_of_file(path)
            for start, length in tensors:
                samples = (start + length * sample // _TENSOR_SAMPLES for sample in range(_TENSOR_SAMPLES))
                places += [(sample, _TENSOR_SAMPLE_BYTES) for sample in samples]
        with path.open("rb") as file:
            for start, length in places:
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _tensors_of_file(path: Path) -> Iterator[tuple[int, int]]:
    """(start, length) in bytes of each tensor of a safetensors file. Empty for a broken file; loading it reports the
    problem. Format: https://github.com/huggingface/safetensors#format."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
        places = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for start, end in places:
        yield 8 + header_bytes + start, end - start


def _tensors_by_file(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """File name -> the same for each file of a Megatron folder."""
    from megadpo.model.weights.safe_files import read_metadata

    found: dict[str, list[tuple[int, int]]] = {}
    for place in read_metadata(folder).storage_data.values():
        found.setdefault(place.relative_path, []).append((place.offset, place.length))
    return {name: sorted(places) for name, places in found.items()}


def tokenizer_source(cfg: Config, source: ModelSource) -> Path | str:
    """The tokenizer's folder or hub name: by default the model's own, in a Megatron folder's hf/."""
    name = cfg.policy.tokenizer.name
    return source.hf_files if name == cfg.policy.model_name else name


def _from_hub(name: str, field: str, expected: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        reason = first_line(error)
        fix = "correct the name, log in with `hf auth login`, or download the model and name its folder"
        raise ConfigError([Problem(field, name, f"{expected}; the hub says: {reason}", fix)]) from error
