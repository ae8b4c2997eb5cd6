"""Shows a BuildReport: as text, as an HTML file, and as a picture (with matplotlib, from the extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megadpo.rollouts.left_out import GROUP_REASONS, PAIR_REASONS, REASONS, ROLLOUT_REASONS, ROW_REASONS
from megadpo.rollouts.report import BuildReport, histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 110
"""Width of the text if there is no terminal."""

_BAR_CHARS = 24
_PICTURE_CHARS = 150
"""Longest line below the panels."""
_KINDS = {"row": ROW_REASONS, "rollout": ROLLOUT_REASONS, "group": GROUP_REASONS, "pair": PAIR_REASONS}


def show(report: BuildReport, console: Console) -> None:
    """Prints the whole report."""
    _show_counts(report, console)
    if report.left_out.counts:
        _show_left_out(report, console)
    if len(report.rewards):
        _show_histogram("rewards of the rollouts", report.rewards, console)
    if report.pairs:
        _show_histogram("reward gaps of the pairs", report.gaps, console)
        _show_lengths(report, console)
    if any(at.pairs for at in report.at_gaps):
        asked = report.options.pairing.min_gap
        rows = [
            [
                f"[bold]{cell}" if at.min_gap == asked else cell
                for cell in (f"{at.min_gap:g}", f"{at.pairs:,}", f"{at.prompts:,}")
            ]
            for at in report.at_gaps
        ]
        console.print(_table("pairs at other gaps", ["--min-gap", "pairs", "groups with pairs"], rows, "rrr"))
    else:
        console.print("no other --min-gap would give a pair")


def write_html(report: BuildReport, path: Path) -> None:
    """Writes the printed report as an HTML file without other resources."""
    console = Console(record=True, file=io.StringIO(), width=COLUMNS, highlight=False)
    show(report, console)
    path.write_text(console.export_html(inline_styles=True), encoding="utf-8")


def write_png(report: BuildReport, path: Path) -> None:
    """Draws rewards, gaps, lengths of chosen and rejected, and pairs at other gaps. Below them: counts, and what was left
    out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _picture_lines(report)
    figure = pyplot.figure(figsize=(11, 7.5 + 0.19 * len(lines)), constrained_layout=True)
    parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[7.5, 0.19 * len(lines)])
    axes = parts[0, 0].subplots(2, 2)
    _draw_histogram(axes[0, 0], f"rewards of {len(report.rewards):,} rollouts", report.rewards)
    _draw_histogram(axes[0, 1], f"reward gaps of {len(report.pairs):,} pairs", report.gaps)
    _draw_lengths(axes[1, 0], report)
    gaps = axes[1, 1]
    gaps.bar([f"{at.min_gap:g}" for at in report.at_gaps], [at.pairs for at in report.at_gaps])
    gaps.set_title("pairs at other gaps")
    gaps.set_xlabel(f"--min-gap (here: {report.options.pairing.min_gap:g})")
    parts[1, 0].text(0.02, 0.98, "\n".join(lines), va="top", fontsize=9, parse_math=False)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)


def _show_counts(report: BuildReport, console: Console) -> None:
    console.print(_table(None, None, [[f"[bold]{count:,}", escape(text)] for count, text in report.counts()], "rl"))
    for text in report.remarks():
        console.print(f"[yellow]note:[/] {escape(text)}")


def _show_left_out(report: BuildReport, console: Console) -> None:
    left_out = report.left_out
    rows = [
        [
            kind,
            reason.replace("_", " "),
            f"{count:,}",
            escape("\n".join(left_out.examples[reason][:2])),
            escape(REASONS[reason].fix),
        ]
        for kind, reasons in _KINDS.items()
        for reason, count in left_out.counts.most_common()
        if reason in reasons
    ]
    console.print(_table("left out", ["", "reason", "count", "first", "what to do"], rows, "llrll"))


def _show_histogram(title: str, values: npt.NDArray[np.float64], console: Console) -> None:
    bins = histogram(values)
    most = max(bins.counts)
    rows = [
        [label, f"{count:,}", "[cyan]" + "█" * round(_BAR_CHARS * count / most)]
        for label, count in zip(bins.labels, bins.counts, strict=True)
    ]
    console.print(_table(title, None, rows, "rrl"))


def _show_lengths(report: BuildReport, console: Console) -> None:
    longer, equal, shorter = (count / len(report.pairs) for count in report.length_bias)
    chosen = _median(pair.chosen.answer_chars for pair in report.pairs)
    rejected = _median(pair.rejected.answer_chars for pair in report.pairs)
    console.print(
        f"length bias: chosen is longer in {longer:.1%} of the pairs, equal in {equal:.1%}, shorter in {shorter:.1%}; "
        f"medians: chosen {chosen:,.0f} characters, rejected {rejected:,.0f}"
    )


def _median(chars: Iterable[int]) -> float:
    return float(np.median(list(chars)))


def _table(title: str | None, header: Sequence[str] | None, rows: Iterable[Sequence[str]], sides: str) -> Table:
    """A table; with a grid if it has a header. sides: `l` or `r` for each column."""
    justify: dict[str, Literal["left", "right"]] = {"l": "left", "r": "right"}
    table = (
        Table(title=title, title_justify="left")
        if header
        else Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    )
    for name, side in zip(header or [""] * len(sides), sides, strict=True):
        table.add_column(name, justify=justify[side], overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _picture_lines(report: BuildReport) -> list[str]:
    lines = [f"{count:,} {text}" for count, text in report.counts()] + [f"note: {text}" for text in report.remarks()]
    for reason, count in report.left_out.counts.most_common():
        lines.append(f"left out: {count:,} {reason.replace('_', ' ')} (first: {report.left_out.examples[reason][0]})")
    return [line if len(line) <= _PICTURE_CHARS else f"{line[:_PICTURE_CHARS]}..." for line in lines]


def _draw_histogram(axes: Axes, title: str, values: npt.NDArray[np.float64]) -> None:
    axes.set_title(title)
    if len(values):
        bins = histogram(values)
        axes.barh(range(len(bins.counts)), bins.counts, tick_label=bins.labels)  # two labels may read the same


def _draw_lengths(axes: Axes, report: BuildReport) -> None:
    longer, _, shorter = report.length_bias
    axes.set_title(f"chosen is longer in {longer:,} pairs, shorter in {shorter:,}")
    axes.set_xlabel("characters of the answer")
    if report.pairs:
        chosen = [pair.chosen.answer_chars for pair in report.pairs]
        rejected = [pair.rejected.answer_chars for pair in report.pairs]
        edges = np.linspace(0, max(*chosen, *rejected, 1), 31)
        axes.hist([chosen, rejected], bins=edges.tolist(), label=["chosen", "rejected"])
        axes.legend()
