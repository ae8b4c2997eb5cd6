"""Checks of files that a command is to write, before it does any work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from megadpo.config.problems import Problem


def output_problems(option: str, path: Path | None, endings: Sequence[str] = ()) -> Iterator[Problem]:
    """Why the file `path` of the command-line option can't be written. endings: those that its name may have; none: any."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        yield Problem(option, str(path), "a file in an existing folder", f"create the folder {path.parent}")
    if endings and not path.name.lower().endswith(tuple(endings)):
        yield Problem(option, str(path), f"a name that ends in {' or '.join(endings)}", "rename it")


def picture_problems(option: str, path: Path | None, endings: Sequence[str] = ()) -> Iterator[Problem]:
    """`output_problems` of a picture that matplotlib draws. endings: default every kind that matplotlib can write."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        yield Problem(option, str(path), "matplotlib to be installed", "pip install 'megadpo[report]'")
    elif not endings:
        from matplotlib.figure import Figure

        endings = [f".{kind}" for kind in sorted(Figure().canvas.get_supported_filetypes())]
    yield from output_problems(option, path, endings)
