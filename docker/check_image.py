"""Does the image have all that a run imports, in versions that megadpo accepts?  Needs no GPU; `docker build` runs it.

    python3 docker/check_image.py [MODULE ...]

Prints the versions, and every problem; exit code 1 if there is one.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from packaging.requirements import Requirement

MODULES = (
    "torch",
    "triton",
    "transformer_engine.pytorch",
    "fused_weight_gradient_mlp_cuda",  # apex's, compiled
    "megatron.core",
    "transformers",
    "megadpo.train.loop",
    "megadpo.model.kernels.varlen",
    "megadpo.model.kernels.transformer_engine",
    "megadpo.model.heads.triton.fused",
)
SHOWN = ("torch", "triton", "transformer-engine", "apex", "megatron-core", "transformers", "megadpo")


def missing_modules(modules: Iterable[str], load: Callable[[str], object] = importlib.import_module) -> Iterator[str]:
    """A line for each module that can't be imported, with the reason; loading may raise anything."""
    for name in modules:
        try:
            load(name)
        except Exception as error:
            yield f"import {name}: {type(error).__name__}: {error}"


def wrong_versions(requirements: Iterable[str], installed: Mapping[str, str | None]) -> Iterator[str]:
    """A line for each requirement (extras left out) that `installed`, name -> version, does not meet. Pre-releases
    count, since the image's torch is one."""
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed.get(requirement.name)
        if version is None:
            yield f"{requirement.name} is not installed; needed: {requirement}"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is installed; needed: {requirement}"


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(modules: list[str]) -> int:
    requirements = importlib.metadata.requires("megadpo") or []
    installed = {name: version(name) for name in (Requirement(line).name for line in requirements)}
    problems = [*missing_modules(modules or MODULES), *wrong_versions(requirements, installed)]
    print(*(f"{name} {version(name) or '(no version known)'}" for name in SHOWN), sep="\n")
    print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
