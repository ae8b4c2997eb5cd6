"""A BuildReport as a picture. Needs matplotlib, the extra `report`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import Problem
from megadpo.rollouts.report import BuildReport, histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINE_CHARS = 150


def missing_matplotlib() -> Problem | None:
    """What to tell a user who asks for a picture where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return Problem("--report", "a .png", "matplotlib", "pip install 'megadpo[report]', or ask for --report FILE.html")


def write_png(report: BuildReport, path: Path) -> None:
    """Rewards, gaps, lengths of chosen and rejected, pairs at other gaps; below them what was counted and left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _lines(report)
    figure = pyplot.figure(figsize=(11, 7.5 + 0.19 * len(lines)), constrained_layout=True)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[7.5, 0.19 * len(lines)])
    panels, words = parts[0, 0], parts[1, 0]
    axes = panels.subplots(2, 2)
    _bars(axes[0, 0], report.rewards, f"rewards of {len(report.rewards):,} rollouts")
    _bars(axes[0, 1], report.gaps, f"reward gaps of {len(report.pairs):,} pairs")
    _lengths(axes[1, 0], report)
    gaps = axes[1, 1]
    gaps.bar([f"{at.min_gap:g}" for at in report.at_gaps], [at.pairs for at in report.at_gaps])
    gaps.set_title("pairs at other gaps")
    gaps.set_xlabel(f"--min-gap (asked: {report.min_gap:g})")
    words.text(0.02, 0.98, "\n".join(lines), va="top", fontsize=9, parse_math=False)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _lines(report: BuildReport) -> list[str]:
    lines = [f"{count:,} {text}" for count, text in report.counts()] + [f"note: {text}" for text in report.remarks()]
    for reason, count in report.left_out.most_common():
        lines.append(f"left out: {count:,} {reason.replace('_', ' ')} (first: {report.examples[reason][0]})")
    return [line if len(line) <= _LINE_CHARS else f"{line[:_LINE_CHARS]}..." for line in lines]


def _bars(axes: Axes, values: npt.NDArray[np.float64], title: str) -> None:
    axes.set_title(title)
    if len(values):
        bins = histogram(values)
        axes.barh(range(len(bins.counts)), bins.counts, tick_label=bins.labels)  # two labels may read the same


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
