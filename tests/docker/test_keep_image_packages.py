"""What the container build may replace: nothing that NVIDIA compiled, and no more of the rest than it must."""

from __future__ import annotations

import runpy
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(REPOSITORY / "docker/keep_image_packages.py"))
IMAGE = {
    "torch": "2.11.0a0+eb65b36914.nv26.2",
    "transformer-engine": "2.12.0+5671fd36",
    "pytorch-triton": "3.6.0",
    "apex": "0.1",
    "numpy": "2.1.0",
    "rich": "14.0.0",
}


def merged() -> dict[str, list[str]]:
    lines = SCRIPT["merge"]((REPOSITORY / "constraints.txt").read_text().splitlines(), IMAGE)
    requirements = [Requirement(line) for line in lines]
    return {r.name: [str(s.specifier) for s in requirements if s.name == r.name] for r in requirements}


def test_compiled_packages_stay():
    for name in ("torch", "transformer-engine", "pytorch-triton", "apex", "numpy"):
        assert merged()[name] == [f"=={IMAGE[name]}"]


def test_what_the_image_has_is_free_and_what_it_lacks_is_pinned():
    assert "rich" not in merged()
    assert merged()["megatron-core"] == ["==0.16.1"]


def test_names_are_compared_as_pip_compares_them():
    assert SCRIPT["normalise"]("Huggingface_Hub") == "huggingface-hub"
    assert (
        list(SCRIPT["merge"](["typing_extensions==4.16.0", "", "# a comment"], {"typing-extensions": "4.12.0"})) == []
    )


def test_the_images_torch_is_within_our_range():
    """An alpha is below its release: without a0 in the range, pip would replace the image's torch."""
    line = next(line for line in (REPOSITORY / "setup.py").read_text().splitlines() if '"torch>=' in line)
    assert Requirement(line.strip().strip('",')).specifier.contains(IMAGE["torch"], prereleases=True)
