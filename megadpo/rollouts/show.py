"""A BuildReport as text: tables on the terminal, and the same as one HTML file."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megadpo.rollouts.left_out import GROUP_REASONS, PAIR_REASONS, REASONS, ROLLOUT_REASONS, ROW_REASONS
from megadpo.rollouts.report import BuildReport, histogram

_BAR_CHARS = 24
COLUMNS = 110
"""Where there is no terminal to ask."""


def show(report: BuildReport, console: Console) -> None:
    """Print the whole report."""
    _show_counts(report, console)
    _show_left_out(report, console)
    if len(report.rewards):
        _show_histogram("rewards of the rollouts", report.rewards, console)
    if report.pairs:
        _show_histogram("reward gaps of the pairs", report.gaps, console)
        _show_lengths(report, console)
    if any(at.pairs for at in report.at_gaps):
        _show_gaps(report, console)
    else:
        console.print("no other --min-gap would give a pair")


def write_html(report: BuildReport, path: Path) -> None:
    """The report as an HTML file that needs nothing else."""
    console = Console(record=True, file=io.StringIO(), width=COLUMNS, highlight=False)
    show(report, console)
    path.write_text(console.export_html(inline_styles=True), encoding="utf-8")


def _show_counts(report: BuildReport, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    for count, text in report.counts():
        table.add_row(f"[bold]{count:,}", escape(text))
    console.print(table)
    for text in report.remarks():
        console.print(f"[yellow]note:[/] {escape(text)}")


def _show_left_out(report: BuildReport, console: Console) -> None:
    kinds = (("row", ROW_REASONS), ("rollout", ROLLOUT_REASONS), ("group", GROUP_REASONS), ("pair", PAIR_REASONS))
    if not report.left_out:
        return
    table = Table(title="left out", title_justify="left")
    for column in ("", "reason", "count", "first", "what to do"):
        table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
    for kind, reasons in kinds:
        for reason, count in report.left_out.most_common():
            if reason in reasons:
                first = escape("\n".join(report.examples[reason][:2]))
                table.add_row(kind, reason.replace("_", " "), f"{count:,}", first, escape(REASONS[reason].fix))
    console.print(table)


def _show_histogram(title: str, values: npt.NDArray[np.float64], console: Console) -> None:
    bins = histogram(values)
    most = max(bins.counts)
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for label, count in zip(bins.labels, bins.counts, strict=True):
        table.add_row(label, f"{count:,}", "[cyan]" + "█" * round(_BAR_CHARS * count / most))
    console.print(table)


def _show_lengths(report: BuildReport, console: Console) -> None:
    longer, equal, shorter = report.length_bias
    chosen = _median(pair.chosen.answer_chars for pair in report.pairs)
    rejected = _median(pair.rejected.answer_chars for pair in report.pairs)
    console.print(
        f"length bias: chosen is longer in {longer / len(report.pairs):.1%} of the pairs, as long in "
        f"{equal / len(report.pairs):.1%}, shorter in {shorter / len(report.pairs):.1%}; medians: chosen {chosen:,.0f} "
        f"characters, rejected {rejected:,.0f}"
    )


def _median(chars: Iterable[int]) -> float:
    return float(np.median(list(chars)))


def _show_gaps(report: BuildReport, console: Console) -> None:
    table = Table(title="pairs at other gaps", title_justify="left")
    for column in ("--min-gap", "pairs", "groups with pairs"):
        table.add_column(column, justify="right")
    for at in report.at_gaps:
        style = "bold" if at.min_gap == report.min_gap else None
        table.add_row(f"{at.min_gap:g}", f"{at.pairs:,}", f"{at.prompts:,}", style=style)
    console.print(table)
