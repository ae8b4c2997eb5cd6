"""A picture of a layout: which ranks hold which pipeline stage, and where nodes end."""

from __future__ import annotations

from pathlib import Path

from megadpo.config.problems import ConfigError, Problem
from megadpo.plan.gpus import GIB
from megadpo.plan.plan import Plan, memory_limit

_MOST_COPIES_IN_TEXT = 8
_MOST_COPIES_DRAWN = 16
FORMATS = (".svg", ".png")


def text_grid(plan: Plan) -> str:
    """A row a pipeline stage, a column a data-parallel copy; a cell is the ranks that share a micro-batch."""
    copies = list(range(plan.grid.data))
    shown = copies if plan.grid.data <= _MOST_COPIES_IN_TEXT else [*copies[: _MOST_COPIES_IN_TEXT - 1], copies[-1]]
    rows = []
    for stage in plan.stages:
        cells = [_ranks(plan, stage.stage, copy) for copy in shown]
        if len(shown) < plan.grid.data:
            cells.insert(-1, "...")
        rows.append([f"stage {stage.stage}", f"{stage.layers} layers", f"{stage.peak / GIB:.1f} GiB", *cells])
    header = ["", "", "", *(f"copy {copy}" for copy in shown)]
    if len(shown) < plan.grid.data:
        header.insert(-1, "...")
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def _ranks(plan: Plan, stage: int, copy: int) -> str:
    first, width = plan.grid.first_rank(stage, copy), plan.grid.tensor * plan.grid.context
    return str(first) if width == 1 else f"{first}-{first + width - 1}"


def check_picture(path: Path) -> list[Problem]:
    """What would keep `draw` from writing `path`."""
    problems = []
    if path.suffix not in FORMATS:
        problems.append(Problem("--picture", str(path), "a name that ends in .svg or .png", "rename it"))
    if not path.absolute().parent.is_dir():
        problems.append(Problem("--picture", str(path), "a file in a folder that exists", "make the folder"))
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        fix = "pip install matplotlib, or leave --picture out: the layout is printed as text as well"
        problems.append(Problem("--picture", str(path), f"matplotlib importable ({error})", fix))
    return problems


def draw(plan: Plan, path: Path) -> None:
    """Write the picture: every rank a box, coloured by its stage's memory; a thick line where a node ends."""
    problems = check_picture(path)
    if problems:
        raise ConfigError(problems)
    from matplotlib import colormaps, rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    copies = min(plan.grid.data, _MOST_COPIES_DRAWN)
    together = plan.grid.tensor * plan.grid.context
    width, height = copies * together, plan.grid.pipeline
    figure = Figure(figsize=(min(3.0 + 0.3 * width, 30), 1.6 + 0.5 * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    limit = memory_limit(plan.job.gpu, plan.job.assumed) if plan.job.gpu is not None else float(plan.peak_bytes)
    colors = colormaps["viridis"]
    node = int(plan.job.assumed.gpus_per_node)
    for stage in plan.stages:
        shade = colors(0.25 + 0.65 * min(stage.peak / limit, 1.0)) if stage.peak <= limit else (0.8, 0.1, 0.1, 1.0)
        for column in range(width):
            rank = plan.grid.first_rank(stage.stage, column // together) + column % together
            corner = (column, stage.stage)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=shade, edgecolor="white", linewidth=0.5))
            axes.text(column + 0.5, stage.stage + 0.5, str(rank), ha="center", va="center", fontsize=7, color="white")
            if column and rank % node == 0:
                axes.plot([column, column], [stage.stage, stage.stage + 1], color="black", linewidth=2)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_xticks([(copy + 0.5) * together for copy in range(copies)], [f"copy {copy}" for copy in range(copies)])
    labels = [f"stage {one.stage}: {one.layers} layers\n{one.peak / GIB:.1f} GiB" for one in plan.stages]
    axes.set_yticks([stage + 0.5 for stage in range(height)], labels)
    more = f", {copies} of {plan.grid.data} copies shown" if copies < plan.grid.data else ""
    on = "" if plan.job.gpu is None else f" {plan.job.gpu.name}"
    axes.set_title(
        f"{plan.job.world_size}{on} ranks: {plan.grid}{more}; black: a node ends",
        fontsize=9,
    )
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan"}):  # text as text: a tenth of the size
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
