"""Draw a run's curves: python tools/plot_run.py LOG_DIR/metrics.jsonl -o curve.png [--mark STEP ...]

Loss and reward accuracy of training, validation where there is any; --mark draws a line at a step, say where the run
was stopped and resumed. Needs matplotlib (the dev extra). Exit code 2: refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure

from megadpo.config.problems import ConfigError, Problem, UserError
from megadpo.train.command import refuse

CURVES = (("loss", "loss"), ("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--mark", type=int, nargs="*", default=[], help="steps to mark")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    try:
        draw(read_records(options.metrics, options.output), options)
    except UserError as error:
        return refuse(error)
    return 0


def read_records(metrics: Path, output: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl. Raises ConfigError where it can't be read, or `output` can't be written."""
    problems = []
    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if output.suffix[1:].lower() not in kinds:
        problems.append(Problem("--output", str(output), f"a name that ends in one of {', '.join(kinds)}", "rename it"))
    if not output.absolute().parent.is_dir():
        problems.append(Problem("--output", str(output), "a file in a folder that is there", "make the folder first"))
    records: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
            records.append(json.loads(line))
            if not isinstance(records[-1], dict) or "step" not in records[-1]:
                raise ValueError(f"line {number} is no step")
    except (OSError, ValueError) as error:
        fix = "give the metrics.jsonl of a run's logger.log_dir"
        problems.append(Problem(str(metrics), str(error), "one JSON object a step", fix))
    if problems:
        raise ConfigError(problems)
    return records


def draw(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the picture."""
    prefixes = sorted({key.split("/")[0] for record in records for key in record if "/" in key} - {"timing", "machine"})

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(4.5 * len(CURVES), 3.4), constrained_layout=True)
    for axis, (metric, label) in zip(axes, CURVES, strict=True):
        for prefix in prefixes:
            steps, values = series(records, f"{prefix}/{metric}")
            width = 1.0 if prefix == "train" else 2.0
            axis.plot(steps, values, label=prefix, linewidth=width, marker="" if prefix == "train" else "o")
        for step in options.mark:
            axis.axvline(step, linestyle="--", color="grey", linewidth=1)
        axis.set_xlabel("step")
        axis.set_title(label)
        axis.legend()
    figure.suptitle(options.title)
    figure.savefig(options.output, dpi=110)


def series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
