"""A BuildReport as a picture. Needs matplotlib, the extra `report`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import Problem
from megadpo.data.rollouts.report import BuildReport, histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def missing_matplotlib() -> Problem | None:
    """What to tell a user who asks for a picture where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return Problem("--report", "a .png", "matplotlib", "pip install 'megadpo[report]', or ask for --report FILE.html")


def write_png(report: BuildReport, path: Path) -> None:
    """Four panels: rewards, gaps, lengths of chosen and rejected, pairs at other gaps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    _bars(axes[0, 0], report.rewards, f"rewards of {len(report.rewards):,} rollouts")
    _bars(axes[0, 1], report.gaps, f"reward gap of {len(report.pairs):,} pairs")
    _lengths(axes[1, 0], report)
    gaps = axes[1, 1]
    gaps.bar([f"{at.min_gap:g}" for at in report.at_gaps], [at.pairs for at in report.at_gaps])
    gaps.set_title("pairs at other gaps")
    gaps.set_xlabel(f"--min-gap (asked: {report.min_gap:g})")
    left_out = sum(report.left_out.values())
    figure.suptitle(f"{report.pairing}; groups {report.grouping}; left out: {left_out:,} rows, groups or pairs")
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _bars(axes: Axes, values: npt.NDArray[np.float64], title: str) -> None:
    axes.set_title(title)
    if len(values):
        bins = histogram(values)
        axes.barh(bins.labels, bins.counts)


def _lengths(axes: Axes, report: BuildReport) -> None:
    longer, _, shorter = report.length_bias
    axes.set_title(f"chosen is longer in {longer:,} pairs, shorter in {shorter:,}")
    axes.set_xlabel("characters of the answer")
    if report.pairs:
        chosen = [pair.chosen.answer_chars for pair in report.pairs]
        rejected = [pair.rejected.answer_chars for pair in report.pairs]
        edges = np.linspace(0, max(*chosen, *rejected, 1), 31)
        axes.hist([chosen, rejected], bins=edges.tolist(), label=["chosen", "rejected"])
        axes.legend()
