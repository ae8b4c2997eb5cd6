"""The files that come with the package: configs by name, launch files.

In a checkout they stand beside the package, where README.md shows them; a wheel has them inside it (setup.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: Literal["configs", "launch"]) -> Path:
    """configs or launch."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def shipped_configs() -> dict[str, Path]:
    """The shipped configs by name, such as dpo_megatron and losses/simpo."""
    folder = shipped_folder("configs")
    return {path.relative_to(folder).as_posix()[: -len(".yaml")]: path for path in sorted(folder.rglob("*.yaml"))}


def find_config(path: str | Path) -> Path:
    """The file that `path` means: itself, or the shipped config of that name where there is no such file."""
    path = Path(path)
    return path if os.path.exists(path) else shipped_configs().get(str(path), path)
