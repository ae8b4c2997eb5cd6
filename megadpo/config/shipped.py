"""Finds the configs and launch files that come with the package: beside it in a checkout, inside it in a wheel (setup.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: Literal["configs", "launch"]) -> Path:
    """The folder configs or launch."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the shipped configs, such as dpo_megatron and losses/simpo."""
    folder = shipped_folder("configs")
    return {path.relative_to(folder).as_posix()[: -len(".yaml")]: path for path in sorted(folder.rglob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """The file `path`; if there is none, the shipped config of that name."""
    path = Path(path)
    return path if os.path.exists(path) else shipped_configs().get(str(path), path)
