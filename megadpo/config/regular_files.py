"""Checks that a folder of a model or a tokenizer has only ordinary files, because libraries open every file there."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.problems import ConfigError, Problem
from megadpo.files.regular import not_regular


def require_regular_files(folder: Path, field: str) -> None:
    """Raises ConfigError, naming `field`, for each pipe, socket or device in `folder`, and in hf/ and model/ of a Megatron
    checkpoint: reading one might never end. Does nothing if `folder` is no folder."""
    try:
        parts = [part for part in (folder, folder / "hf", folder / "model") if part.is_dir()]
        found = [one for part in parts for one in not_regular(part)]
    except OSError as error:
        problem = Problem(field, str(folder), f"a folder that can be read ({error.strerror})", "choose another")
        raise ConfigError(problem) from error
    if found:
        expected, fix = "ordinary files only", "remove it from the folder"
        raise ConfigError(Problem(f"{field}: {path}", kind, expected, fix) for path, kind in found)
