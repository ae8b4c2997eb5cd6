"""Compare runs in a table and draw their curves: megadpo plot RUN ... [-o CURVES.png] [--table RUNS.csv]

RUN is a run's logger.log_dir, its metrics.jsonl, or a folder with several runs in it. The table has a column for each run:
its last step, the means of its last training steps, and every validation set's last metrics and lowest loss. -o draws loss,
reward accuracy and reward margin: training smoothed over --smooth steps, validation as measured. It needs matplotlib (pip
install 'megadpo[report]'). Exit code 2: refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from megadpo.commands import command_parser
from megadpo.config.output_files import output_problems, picture_problems
from megadpo.config.problems import ConfigError, Problem
from megadpo.files.atomic import write_then_rename

Records: TypeAlias = "list[dict[str, Any]]"
"""A run's metrics.jsonl: one mapping for each step."""

METRICS_FILE = "metrics.jsonl"
CURVES = (("loss", "loss"), ("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"))


def main(arguments: Sequence[str]) -> int:
    """Print and draw; returns the exit code. Raises ConfigError with every problem."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="log_dir, metrics.jsonl, or a folder of runs")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the picture: .png, .svg, .pdf, ...")
    parser.add_argument("--table", type=Path, metavar="FILE.csv", help="also write the table")
    parser.add_argument("--smooth", type=int, default=10, metavar="N", help="steps of a mean (default: 10; 1: none)")
    parser.add_argument("--mark", type=int, nargs="*", default=[], help="steps to mark")
    parser.add_argument("--title", default="")
    options = parser.parse_intermixed_args(arguments)
    problems = list(_option_problems(options))
    runs = _read_runs(options.runs, problems)
    if problems:
        raise ConfigError(problems)
    rows = [{"run": name, **_summary(records, options.smooth)} for name, records in runs.items()]
    _print_table(rows)
    if options.table is not None:
        _write_table(rows, options.table)
    if options.output is not None:
        _draw(runs, options)
    return 0


def _option_problems(options: argparse.Namespace) -> Iterator[Problem]:
    if options.smooth < 1:
        yield Problem("--smooth", options.smooth, "1 or more", "give the number of steps to average over")
    yield from picture_problems("--output", options.output)
    yield from output_problems("--table", options.table, [".csv"])


def _read_runs(given: Sequence[Path], problems: list[Problem]) -> dict[str, Records]:
    """The runs by name: their folders' paths without the part that all have in common."""
    files: list[Path] = []
    for path in given:
        below = [path / METRICS_FILE] if (path / METRICS_FILE).is_file() else sorted(path.rglob(METRICS_FILE))
        found = below if path.is_dir() else [path]
        if not found:
            fix = "give a run's logger.log_dir, or a folder above some"
            problems.append(Problem(str(path), "no metrics.jsonl", "a folder with the metrics of a run", fix))
        files += found
    files = list(dict.fromkeys(path.absolute() for path in files))
    above = os.path.commonpath([path.parent.parent for path in files]) if files else ""
    runs = {}
    for path in files:
        try:
            runs[str(path.parent.relative_to(above))] = _read_records(path)
        except (OSError, ValueError) as error:
            fix = "give the metrics.jsonl of a run's logger.log_dir"
            problems.append(Problem(str(path), str(error), "one JSON object on each line", fix))
    return runs


def _read_records(path: Path) -> Records:
    """The file's lines. Raises ValueError for a line without a step, and for a file without lines."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"line {number} has no step")
        records.append(record)
    if not records:
        raise ValueError("it has no steps yet")
    return records


def _prefixes(records: Records) -> list[str]:
    """train, and validation-<name> for each validation set."""
    found = {key.split("/")[0] for record in records for key in record if "/" in key}
    return sorted(one for one in found if one == "train" or one.startswith("validation-"))


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the `width` - 1 values before it (fewer at the beginning)."""
    return [sum(part := values[max(0, end - width) : end]) / len(part) for end in range(1, len(values) + 1)]


def _summary(records: Records, width: int) -> dict[str, float]:
    """A run's column of the table: means of the last `width` training steps, and validation's last values."""
    row: dict[str, float] = {"step": records[-1]["step"]}
    for prefix in _prefixes(records):
        for metric, _ in CURVES:
            _, values = _series(records, f"{prefix}/{metric}")
            if values:
                row[f"{prefix}/{metric}"] = _smoothed(values, width if prefix == "train" else 1)[-1]
        steps, losses = _series(records, f"{prefix}/loss")
        if losses and prefix != "train":
            row[f"{prefix}/lowest loss"] = lowest = min(losses)
            row[f"{prefix}/lowest loss at step"] = steps[losses.index(lowest)]
    return row


def _columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Prints one column for each run. In a file the console is wide enough that no line is broken."""
    console = Console()
    table = Table("", *(str(row["run"]) for row in rows), box=None, pad_edge=False)
    for name in _columns(rows)[1:]:
        values = (row.get(name) for row in rows)
        table.add_row(name, *("-" if value is None else f"{value:.6g}" for value in values))
    (console if console.is_terminal else Console(width=60 + 30 * len(rows))).print(table)


def _write_table(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    with write_then_rename(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def _draw(runs: Mapping[str, Records], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(4.5 * len(CURVES), 3.4), constrained_layout=True)
    for axis, (metric, label) in zip(axes, CURVES, strict=True):
        for name, records in runs.items():
            for prefix in _prefixes(records):
                steps, values = _series(records, f"{prefix}/{metric}")
                words = prefix if len(runs) == 1 else f"{name}, {prefix}"
                if prefix != "train":
                    axis.plot(steps, values, label=words, linewidth=2.0, marker="o")
                    continue
                (line,) = axis.plot(steps, _smoothed(values, options.smooth), label=words, linewidth=1.0)
                if options.smooth > 1:
                    axis.plot(steps, values, linewidth=0.5, alpha=0.3, color=line.get_color())
        for step in options.mark:
            axis.axvline(step, linestyle="--", color="grey", linewidth=1)
        axis.set_xlabel("step")
        axis.set_title(label)
        axis.legend(fontsize="small")
    figure.suptitle(options.title)
    figure.savefig(options.output, dpi=110)
    pyplot.close(figure)
