"""What `policy.model_name` may name: a Hugging Face folder, a hub name, or a Megatron checkpoint folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config

_SAMPLES, _SAMPLE_BYTES = 32, 2048


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are."""

    hf_files: Path
    """config.json and tokenizer files; the weights too where `megatron` is None."""
    megatron: Path | None
    """Checkpoint folder (holding model/ and hf/) with the weights, or None."""


def resolve_source(name: str, field: str, *, weights: bool = True) -> ModelSource:
    """Find the folder that `name` means. A hub name is downloaded, or found in the hub's local cache; weights: with
    its safetensors.

    Raises ConfigError naming `field` where there is no such folder or model.
    """
    folder = Path(name)
    if (folder / "megadpo.json").is_file() and (folder / "hf").is_dir():
        return ModelSource(hf_files=folder / "hf", megatron=folder)
    if folder.is_dir():
        return ModelSource(hf_files=folder, megatron=None)
    expected = "a Hugging Face folder or hub name, or a Megatron checkpoint folder"
    if folder.is_file():
        raise ConfigError([Problem(field, name, f"{expected}; this is a file", "name the folder it is in")])
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError([Problem(field, name, f"{expected}; there is no such folder", "correct the path")])
    return ModelSource(hf_files=_from_hub(name, field, expected, weights), megatron=None)


def reference_source(cfg: Config, policy_source: ModelSource) -> ModelSource:
    """Where the reference's weights are: `dpo.reference.model_name`, or what the policy started from."""
    if cfg.dpo.reference.model_name is None:
        return policy_source
    return resolve_source(cfg.dpo.reference.model_name, "dpo.reference.model_name")


def weights_fingerprint(source: ModelSource) -> str:
    """sha256 over the sizes of the weight files and a few bytes from all over each: what tells the models of one
    architecture apart, without reading them. The same for a copy of the folder, whatever its name."""
    files = source.hf_files.glob("*.safetensors") if source.megatron is None else source.megatron.glob("model/*.distcp")
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(size * sample // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def tokenizer_source(cfg: Config, source: ModelSource) -> Path | str:
    """The tokenizer's folder or hub name: by default the model's own, which a Megatron folder keeps in hf/."""
    name = cfg.policy.tokenizer.name
    return source.hf_files if name == cfg.policy.model_name else name


def _from_hub(name: str, field: str, expected: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.model", "*.jinja", "*.txt", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen kinds; each means: not to be had
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "correct the name, log in with `hf auth login`, or download the model and name its folder"
        raise ConfigError([Problem(field, name, f"{expected}; the hub says: {reason}", fix)]) from error
