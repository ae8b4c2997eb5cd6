"""docs/layouts.md: written from the results of the matrix, and read back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megadpo.config.problems import Problem
from tests.helpers.equal_runs import TOLERANCE
from tests.layouts.impossible import IMPOSSIBLE, Impossible
from tests.layouts.matrix import MOST_PROCESSES, Case, all_cases, as_overrides, larger_cases, options_of
from tests.layouts.models import LAYERS, MODELS, Model
from tests.layouts.options import OPTIONS
from tests.layouts.prove import Proved

PAGE = Path(__file__).resolve().parents[2] / "docs/layouts.md"
COMMAND = "make test-layouts"
TWICE = "-"
_RUN = re.compile(r"(?m)^Run: (.*)$")

_HEAD = f"""# Every pair of layouts against one process

Written by `{COMMAND}`; change `tests/layouts/options.py` or `models.py` and run it again, not this page. A test of
`make test` fails where this page and the code disagree.

A number is the largest relative difference between a run in this layout and a run of one process, over every metric of
`metrics.jsonl` in each of three steps, a validation after the second, the gradient norm, and every rank's part of the
weights after the third, copies included. float32 on CPUs, {LAYERS} layers, each run with the fewest processes in which its
options have an effect. At most {TOLERANCE:.0e} passes. The differences are relative to:

- for a metric: its value in one process. A reward or a margin starts at 0 and is beta times a difference of
  log-probabilities, with their rounding, so its difference is relative to beta x |logps of the chosen answers|;
- for a weight: the 2-norm of the rank's part (the difference is a 2-norm too).

The number of pairs, the learning rate, the epoch and the number of tokens are equal exactly (tokens: unless the layout doesn't
share prompts, which computes more of them). Timings are not compared, nor the accuracy of step 1, where every margin is 0 except
for rounding.

**R1** and so on: refused by the config check (`megadpo check`, and every start before any process group is
made), for the reason with that number below. **{TWICE}**: the two are different values of one key. The diagonal is the
option alone.
"""


def render(results: Mapping[str, Proved], impossible: Sequence[Sequence[Problem]], run: str) -> str:
    """The page. `results`: by case name, all of them; `impossible`: the check's answers to IMPOSSIBLE; `run`: one line
    on when and with what."""
    reasons = list(dict.fromkeys(reason for case in all_cases() for reason in results[case.name].refused))
    shown = {case.name: _cell(case, results[case.name], reasons) for case in all_cases()}
    ran = [found.relative for found in results.values() if found.relative is not None]
    refused = sum(bool(found.refused) for found in results.values())
    lines = [
        _HEAD,
        f"Run: {run}",
        "",
        f"{len(ran)} cases equal, the largest difference {max(ran):.0e}; {refused} refused; "
        f"{len(results) - len(ran) - refused} need more than {MOST_PROCESSES} processes and were not run.",
        "",
        "## Options",
        "",
        "Keys of `policy.megatron_cfg` unless they say otherwise.",
        "",
        *_rows(["option", "what it sets"], [[option.name, option.about] for option in OPTIONS]),
    ]
    for model in MODELS:
        lines += ["", f"## {model.name}", "", f"{model.about}.", "", *_triangle(model, shown)]
    larger = [[c.model.name, _together(c), str(c.world_size), shown[c.name]] for c in larger_cases()]
    lines += ["", "## Three and more at once", ""]
    lines += _rows(["model", "options", "processes", "difference"], larger)
    lines += ["", "## Reasons", "", *(f"- **R{number}** {_escaped(r)}" for number, r in enumerate(reasons, start=1))]
    lines += [
        "",
        "## Impossible layouts",
        "",
        "Each is refused with the named key and the expected value.",
        "",
    ]
    refusals = [_refusal(i, problems) for i, problems in zip(IMPOSSIBLE, impossible, strict=True)]
    lines += _rows(["model", "processes", "settings", "refused at", "expected"], refusals)
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[dict[str, float], str]:
    """(differences by case name, the line on when and with what) of a rendered page."""
    sections = {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}
    found: dict[str, float] = {}
    for model in MODELS:
        (_, *columns), *rows = _cells(sections.get(model.name, ""))
        for row, *cells in rows:
            for column, cell in zip(columns, cells, strict=True):
                name = row.strip("*") if row.strip("*") == column else f"{column} + {row.strip('*')}"
                _note(found, f"{model.name}: {name}", cell)
    for model_name, options, _, cell in _cells(sections.get("Three and more at once", ""))[1:]:
        _note(found, f"{model_name}: {options}", cell)
    run = _RUN.search(text)
    return found, run[1] if run else ""


def _note(found: dict[str, float], name: str, cell: str) -> None:
    if re.fullmatch(r"\d+(\.\d+)?(e[-+]?\d+)?", cell):
        found[name] = float(cell)


def _cells(section: str) -> list[list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("|") and not line.startswith("|-")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] or [[""]]


def _triangle(model: Model, shown: Mapping[str, str]) -> Iterator[str]:
    options = options_of(model)
    rows = []
    for number, row in enumerate(options):
        pairs = [Case(model, (column, row)) for column in options[:number]]
        cells = [shown.get(case.name, TWICE) for case in [*pairs, Case(model, (row,))]]
        rows.append([f"**{row.name}**", *cells, *[""] * (len(options) - number - 1)])
    return iter(_rows(["", *(option.name for option in options)], rows))


def _cell(case: Case, found: Proved, reasons: Sequence[str]) -> str:
    if found.refused:
        return " ".join(f"R{reasons.index(reason) + 1}" for reason in found.refused)
    return f"needs {case.world_size}" if found.relative is None else f"{found.relative:.0e}"


def _together(case: Case) -> str:
    return " + ".join(option.name for option in case.options)


def _refusal(impossible: Impossible, problems: Sequence[Problem]) -> list[str]:
    def short(text: str) -> str:
        return f"`{text.removeprefix('policy.megatron_cfg.')}`"

    settings = "<br>".join(short(one) for one in as_overrides(impossible.values))
    expected = "<br>".join(_escaped(problem.expected) for problem in problems)
    return [impossible.model, str(impossible.world_size), settings, short(impossible.field), expected]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return (
        [f"| {' | '.join(row)} |" for row in (head,)]
        + ["|" + "---|" * len(head)]
        + [f"| {' | '.join(row)} |" for row in rows]
    )
