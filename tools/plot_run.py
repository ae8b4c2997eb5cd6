"""Draw a run's curves: python tools/plot_run.py LOG_DIR/metrics.jsonl -o curve.png [--mark STEP ...]

Loss and reward accuracy of training, validation where there is any; --mark draws a line at a step, say where the run
was stopped and resumed. Needs matplotlib (the dev extra).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

CURVES = (("loss", "loss"), ("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--mark", type=int, nargs="*", default=[], help="steps to mark")
    parser.add_argument("--title", default="")
    options = parser.parse_args()
    records = [json.loads(line) for line in options.metrics.read_text().splitlines()]
    prefixes = sorted({key.split("/")[0] for record in records for key in record if "/" in key} - {"timing"})

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
    main()
