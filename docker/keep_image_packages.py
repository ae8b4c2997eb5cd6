"""Constraints for installing megadpo into an NVIDIA PyTorch image without touching what NVIDIA compiled there.

    python3 keep_image_packages.py constraints.txt > merged.txt

The image's torch is no release: Transformer Engine, apex and flash-attention are compiled against exactly that build,
and pip can't get it back once replaced. So those packages are pinned to what the image has. Of the others, what is
absent gets the version in constraints.txt, and what is there may stay or be upgraded as pip sees fit.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

COMPILED = re.compile(r"(torch|triton|transformer-engine|apex|flash-attn|nvidia|cuda|numpy)")
"""Beginnings of the names that are pinned; numpy because the others are built against its major version."""


def merge(constraints: Iterable[str], installed: Mapping[str, str]) -> Iterator[str]:
    """Lines of a constraint file. installed: normalised name -> version."""
    for name, version in sorted(installed.items()):
        if COMPILED.match(name.removeprefix("pytorch-")):
            yield f"{name}=={version}"
    for line in constraints:
        name = re.split(r"[=; ]", line.strip())[0]
        if name and not name.startswith("#") and normalise(name) not in installed:
            yield line.strip()


def normalise(name: str) -> str:
    """As in https://packaging.python.org/en/latest/specifications/name-normalization/"""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(arguments: list[str]) -> int:
    installed = {normalise(d.name): d.version for d in importlib.metadata.distributions() if d.name and d.version}
    print("\n".join(merge(Path(arguments[0]).read_text().splitlines(), installed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
