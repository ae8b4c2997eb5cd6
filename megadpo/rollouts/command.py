"""The command behind tools/build_pairs.py."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from megadpo.config.problems import ConfigError, DataError, Problem
from megadpo.files.atomic import write_then_rename
from megadpo.rollouts.build import BuildOptions, build_pairs, rejected_path
from megadpo.rollouts.chart import missing_matplotlib, write_png
from megadpo.rollouts.pairing import PAIRINGS, PairingOptions
from megadpo.rollouts.report import BuildReport
from megadpo.rollouts.row import RowOptions
from megadpo.rollouts.show import COLUMNS, show, write_html


def run(arguments: Sequence[str]) -> None:
    """Build and print the report. Raises ConfigError for options, DataError for files and where no pair came out."""
    options = _parser().parse_args(arguments)
    problems = list(_problems(options))
    if problems:
        raise ConfigError(problems)
    build = _build_options(options)
    with _progress() as progress:
        task = progress.add_task("rows read", total=None)
        report = build_pairs(options.rollouts, options.output, build, lambda: progress.advance(task))
    report.pairing = _said(options)
    show(report, Console(highlight=False, width=None if sys.stdout.isatty() else COLUMNS))
    if options.report:
        _write_report(report, options.report)
    rejected, left_out = rejected_path(options.output), sum(report.left_out.values())
    if not report.pairs:
        there = "left as it was" if options.output.exists() else "not written"
        raise DataError(
            Problem(
                ", ".join(str(path) for path in options.rollouts),
                "no pair",
                "two answers to one prompt with a reward gap",
                f"see the reasons above and in {rejected}; {options.output} was {there}",
            )
        )
    pairs = f"{len(report.pairs):,} pair{'s' * (len(report.pairs) > 1)}"
    print(f"wrote {options.output}: {pairs}; {rejected}: {left_out:,} left out")


def _progress() -> Progress:
    """Rows so far, on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed:,.0f} {task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/build_pairs.py", description="NeMo Gym rollouts -> preference pairs for training."
    )
    parser.add_argument("rollouts", nargs="+", type=Path, help="rollouts files: .jsonl, .jsonl.gz, .jsonl.zst")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="PAIRS.jsonl")
    parser.add_argument("--report", type=Path, metavar="FILE", help="the printed report as .html, or drawn as .png")
    group = parser.add_argument_group("grouping")
    group.add_argument(
        "--group-by",
        choices=("auto", "task", "input"),
        default=None,
        help="_ng_task_index (and input), the input alone, or auto: task where every rollout has its index",
    )
    group.add_argument("--num-repeats", type=int, metavar="N", help="N consecutive rows are a group")
    pairing = parser.add_argument_group("pairing")
    pairing.add_argument("--pairing", choices=PAIRINGS, default="best-worst", help="default: %(default)s")
    pairing.add_argument(
        "--min-gap", type=float, default=0.1, metavar="X", help="least reward gap; 0: any (default: %(default)s)"
    )
    pairing.add_argument("--min-chosen-reward", type=float, metavar="X")
    pairing.add_argument("--max-pairs-per-prompt", type=int, metavar="N", help="widest gaps first; random: default 1")
    pairing.add_argument("--dedupe", action="store_true", help="equal answers and equal pairs count once")
    pairing.add_argument("--seed", type=int, help="of random and --balance-lengths (default: 0)")
    length = parser.add_argument_group("length (characters that the assistant wrote)")
    length.add_argument("--match-lengths", action="store_true", help="among equal gaps, similar lengths first")
    length.add_argument("--max-length-ratio", type=float, metavar="R", help="longer answer at most R x the shorter")
    length.add_argument(
        "--balance-lengths", action="store_true", help="chosen longer as often as shorter; drops the smallest gaps"
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--reasoning", choices=("keep", "drop"), default="keep", help="reasoning_content of answers")
    rows.add_argument("--keep-incomplete", action="store_true", help="use answers cut at max_output_tokens")
    rows.add_argument("--text", action="store_true", help="write strings; refuses rows that a string can't hold")
    return parser


def _problems(options: argparse.Namespace) -> Iterator[Problem]:
    for name, least in (("min_gap", 0), ("max_length_ratio", 1), ("min_chosen_reward", -math.inf)):
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            expected = "a number" if least == -math.inf else f"a number of at least {least}"
            yield Problem(_flag(name), value, expected, "change it or leave it out")
    for name, least in (("num_repeats", 2), ("max_pairs_per_prompt", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            yield Problem(_flag(name), value, f"an integer of at least {least}", "change it or leave it out")
    yield from _without_effect(options)
    yield from _path_problems(options)


def _without_effect(options: argparse.Namespace) -> Iterator[Problem]:
    if options.num_repeats is not None and options.group_by is not None:
        yield Problem("--num-repeats", options.num_repeats, f"no --group-by {options.group_by}", "give one of the two")
    if options.seed is not None and options.pairing != "random" and not options.balance_lengths:
        yield Problem("--seed", options.seed, "--pairing random or --balance-lengths", "leave it out: nothing is drawn")
    if options.match_lengths and options.pairing == "random":
        yield Problem("--match-lengths", True, "a --pairing by gap", "leave it out, or use --max-length-ratio")
    if options.pairing == "best-worst" and (options.max_pairs_per_prompt or 1) > 1:
        expected = "1 with --pairing best-worst"
        yield Problem("--max-pairs-per-prompt", options.max_pairs_per_prompt, expected, "use --pairing all")


def _path_problems(options: argparse.Namespace) -> Iterator[Problem]:
    written = {"--output": options.output, "the rejected file": rejected_path(options.output)}
    if options.report is not None:
        written["--report"] = options.report
        if options.report.suffix not in (".html", ".png"):
            yield Problem("--report", str(options.report), "a name that ends in .html or .png", "rename it")
        elif options.report.suffix == ".png" and (missing := missing_matplotlib()):
            yield missing
    if options.output.suffix != ".jsonl":
        yield Problem("--output", str(options.output), "a name that ends in .jsonl", "rename it: training reads JSONL")
    places: dict[str, str] = {}
    for path in options.rollouts:
        place = os.path.realpath(path)
        if place in places:
            yield Problem(
                str(path), "a file given twice", "each file once", "remove it: its rollouts would count twice"
            )
        places[place] = "a rollouts file"
    for name, path in written.items():
        if path.is_dir():
            yield Problem(name, str(path), "a file", "name a file in that folder")
        elif not path.parent.is_dir():
            yield Problem(name, str(path), "a file in a folder that exists", f"make the folder {path.parent}")
        other = places.setdefault(os.path.realpath(path), name)
        if other != name:
            yield Problem(name, str(path), f"another file than {other}", "rename it: that file would be overwritten")


def _build_options(options: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        row=RowOptions(
            keep_reasoning=options.reasoning == "keep", keep_incomplete=options.keep_incomplete, text=options.text
        ),
        pairing=PairingOptions(
            pairing=options.pairing,
            min_gap=options.min_gap,
            min_chosen_reward=options.min_chosen_reward,
            max_pairs_per_prompt=options.max_pairs_per_prompt,
            max_length_ratio=options.max_length_ratio,
            match_lengths=options.match_lengths,
            seed=options.seed or 0,
        ),
        group_by=options.group_by or "auto",
        num_repeats=options.num_repeats,
        dedupe=options.dedupe,
        balance_lengths=options.balance_lengths,
    )


def _said(options: argparse.Namespace) -> str:
    """Pairing and its options as given, for the report."""
    said = [options.pairing, f"--min-gap {options.min_gap:g}"]
    for name in ("min_chosen_reward", "max_pairs_per_prompt", "max_length_ratio", "seed"):
        if (value := getattr(options, name)) is not None:
            said.append(f"{_flag(name)} {value:g}")
    said += [_flag(name) for name in ("dedupe", "match_lengths", "balance_lengths") if getattr(options, name)]
    return " ".join(said)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _write_report(report: BuildReport, path: Path) -> None:
    try:
        with write_then_rename(path) as partial:
            (write_png if path.suffix == ".png" else write_html)(report, partial)
    except OSError as error:
        said = error.strerror or type(error).__name__
        raise DataError(Problem("--report", said, "a file that can be written", f"name another than {path}")) from error
    print(f"wrote {path}", file=sys.stderr)
