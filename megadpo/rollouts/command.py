"""What `megadpo pairs` does."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from megadpo.config.problems import DataError, Problem
from megadpo.files.atomic import write_then_rename
from megadpo.rollouts.build import build_pairs
from megadpo.rollouts.options import Command, rejected_path
from megadpo.rollouts.report import BuildReport
from megadpo.rollouts.show import COLUMNS, show, write_html, write_png


def run(command: Command) -> None:
    """Builds pairs and prints the report. Raises DataError for files and if there is no pair."""
    with _progress() as progress:
        task = progress.add_task("rows read", total=None)
        report = build_pairs(command.rollouts, command.output, command.build, lambda: progress.advance(task))
    show(report, Console(highlight=False, width=None if sys.stdout.isatty() else COLUMNS))
    if command.report:
        _write_report(report, command.report)
    output, rejected = command.output, rejected_path(command.output)
    if not report.pairs:
        state = "not changed" if output.exists() else "not written"
        files = ", ".join(str(path) for path in command.rollouts)
        fix = f"see the reasons above and in {rejected}; {output} was {state}"
        raise DataError(Problem(files, "no pair", "two answers to one prompt with a reward gap", fix))
    pairs = f"{len(report.pairs):,} pair{'s' * (len(report.pairs) > 1)}"
    print(f"wrote {output}: {pairs}; {rejected}: {report.left_out.counts.total():,} left out")


def _progress() -> Progress:
    """Shows the number of rows read, if stderr is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} {task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _write_report(report: BuildReport, path: Path) -> None:
    try:
        with write_then_rename(path) as partial:
            (write_png if path.suffix == ".png" else write_html)(report, partial)
    except OSError as error:
        reason, fix = error.strerror or type(error).__name__, f"name another file than {path}"
        raise DataError(Problem("--report", reason, "a file that can be written", fix)) from error
    print(f"wrote {path}", file=sys.stderr)
