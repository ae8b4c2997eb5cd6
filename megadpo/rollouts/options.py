"""The options of `megadpo pairs`."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from megadpo.config.problems import ConfigError, Problem
from megadpo.rollouts.group import GroupBy
from megadpo.rollouts.pairing import Pairing, PairingOptions
from megadpo.rollouts.row import RowOptions

Rows: TypeAlias = Literal["pairs", "answers"]
"""A row for each pair, or for the pairs of a group: its prompt and each answer once."""

_CHANGE = "change it or leave it out"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options that decide which pairs are built."""

    row: RowOptions = field(default_factory=RowOptions)
    pairing: PairingOptions = field(default_factory=PairingOptions)
    group_by: GroupBy = "auto"
    num_repeats: int | None = None
    """Group this many consecutive rows; `group_by` is then ignored."""
    dedupe: bool = False
    """Keep one of equal answers of a group, and one of equal pairs. Leave out answers with two rewards."""
    balance_lengths: bool = False
    rows: Rows = "pairs"

    def __str__(self) -> str:
        """The pairing and its options as flags, for the report."""
        pairing = self.pairing
        flags = [pairing.pairing, f"--min-gap {pairing.min_gap:g}"]
        for name in ("min_chosen_reward", "max_pairs_per_prompt", "max_length_ratio"):
            if (value := getattr(pairing, name)) is not None:
                flags.append(f"{_flag(name)} {value:g}")
        flags += [f"--seed {pairing.seed}"] if pairing.seed else []
        chosen = {
            "dedupe": self.dedupe,
            "match_lengths": pairing.match_lengths,
            "balance_lengths": self.balance_lengths,
        }
        return " ".join(flags + [_flag(name) for name, is_on in chosen.items() if is_on])


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of `megadpo pairs`."""

    rollouts: list[Path]
    output: Path
    report: Path | None
    """A .html or .png file."""
    build: BuildOptions


def read_options(given: argparse.Namespace) -> Command:
    """What `add_options` parsed. Raises ConfigError with every problem."""
    problems = [*_value_problems(given), *_problems_without_effect(given), *_path_problems(given)]
    if problems:
        raise ConfigError(problems)
    keep_reasoning = given.reasoning == "keep"
    named = {one.name: getattr(given, one.name) for one in fields(PairingOptions)}
    build = BuildOptions(
        row=RowOptions(keep_reasoning=keep_reasoning, keep_incomplete=given.keep_incomplete, text=given.text),
        pairing=PairingOptions(**named | {"seed": given.seed or 0}),
        group_by=given.group_by or "auto",
        num_repeats=given.num_repeats,
        dedupe=given.dedupe,
        balance_lengths=given.balance_lengths,
        rows=given.rows,
    )
    return Command(rollouts=given.rollouts, output=given.output, report=given.report, build=build)


def rejected_path(output: Path) -> Path:
    """The file for everything that is left out of `output`."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.rejected.jsonl")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Everything that `megadpo pairs` takes."""
    parser.add_argument("rollouts", nargs="+", type=Path, help="rollouts files: .jsonl, .jsonl.gz, .jsonl.zst")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="PAIRS.jsonl")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the report to FILE (.html or .png)")
    group = parser.add_argument_group("grouping")
    group.add_argument(
        "--group-by",
        choices=get_args(GroupBy),
        default=None,
        help="task: _ng_task_index and input; input: the input only; auto: task if every rollout has an index",
    )
    group.add_argument("--num-repeats", type=int, metavar="N", help="each N consecutive rows are a group")
    pairing = parser.add_argument_group("pairing")
    pairing.add_argument("--pairing", choices=get_args(Pairing), default="best-worst", help="default: %(default)s")
    pairing.add_argument(
        "--min-gap",
        type=float,
        default=0.1,
        metavar="X",
        help="smallest reward gap of a pair; 0: any gap (default: %(default)s)",
    )
    pairing.add_argument("--min-chosen-reward", type=float, metavar="X")
    pairing.add_argument(
        "--max-pairs-per-prompt", type=int, metavar="N", help="largest gaps first; default with random: 1"
    )
    pairing.add_argument("--dedupe", action="store_true", help="keep one of equal answers and equal pairs")
    pairing.add_argument("--seed", type=int, help="for --pairing random and --balance-lengths (default: 0)")
    length = parser.add_argument_group("length (characters that the assistant wrote)")
    length.add_argument("--match-lengths", action="store_true", help="with equal gaps, prefer similar lengths")
    length.add_argument("--max-length-ratio", type=float, metavar="R", help="length of longer / shorter answer <= R")
    length.add_argument(
        "--balance-lengths",
        action="store_true",
        help="chosen is longer as often as shorter; leaves out pairs with the smallest gaps",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--rows",
        choices=get_args(Rows),
        default="pairs",
        help="pairs: a row for each; answers: a row for the pairs of a prompt, with each answer once (default: %(default)s)",
    )
    rows.add_argument("--reasoning", choices=("keep", "drop"), default="keep", help="reasoning_content of answers")
    rows.add_argument("--keep-incomplete", action="store_true", help="use answers that end at max_output_tokens")
    rows.add_argument("--text", action="store_true", help="write plain strings; leaves out rows with other content")


def _value_problems(options: argparse.Namespace) -> Iterator[Problem]:
    for name, least in (("min_gap", 0), ("max_length_ratio", 1), ("min_chosen_reward", -math.inf)):
        value = getattr(options, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            expected = "a number" if least == -math.inf else f"a number of at least {least}"
            yield Problem(_flag(name), value, expected, _CHANGE)
    for name, least in (("num_repeats", 2), ("max_pairs_per_prompt", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            yield Problem(_flag(name), value, f"an integer of at least {least}", _CHANGE)


def _problems_without_effect(options: argparse.Namespace) -> Iterator[Problem]:
    if options.num_repeats is not None and options.group_by is not None:
        yield Problem("--num-repeats", options.num_repeats, f"no --group-by {options.group_by}", "give one of the two")
    if options.seed is not None and options.pairing != "random" and not options.balance_lengths:
        fix = "leave it out: nothing is random"
        yield Problem("--seed", options.seed, "--pairing random or --balance-lengths", fix)
    if options.match_lengths and options.pairing == "random":
        yield Problem("--match-lengths", True, "another --pairing", "leave it out, or use --max-length-ratio")
    if options.pairing == "best-worst" and (options.max_pairs_per_prompt or 1) > 1:
        expected = "1 with --pairing best-worst"
        yield Problem("--max-pairs-per-prompt", options.max_pairs_per_prompt, expected, "use --pairing all")


def _path_problems(options: argparse.Namespace) -> Iterator[Problem]:
    written = {"--output": options.output, "the rejected file": rejected_path(options.output)}
    if options.report is not None:
        written["--report"] = options.report
        if options.report.suffix not in (".html", ".png"):
            yield Problem("--report", str(options.report), "a name that ends in .html or .png", "rename it")
        elif options.report.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
            fix = "pip install 'megadpo[report]', or use --report FILE.html"
            yield Problem("--report", "a .png", "matplotlib to be installed", fix)
    if options.output.suffix != ".jsonl":
        yield Problem("--output", str(options.output), "a name that ends in .jsonl", "rename it: training reads JSONL")
    places: dict[str, str] = {}
    for path in options.rollouts:
        place = os.path.realpath(path)
        if place in places:
            fix = "remove it: its rollouts would count twice"
            yield Problem(str(path), "a file given twice", "each file once", fix)
        places[place] = "a rollouts file"
    for name, path in written.items():
        if path.is_dir():
            yield Problem(name, str(path), "a file", "name a file in that folder")
        elif not path.parent.is_dir():
            yield Problem(name, str(path), "a file in an existing folder", f"create the folder {path.parent}")
        other = places.setdefault(os.path.realpath(path), name)
        if other != name:
            yield Problem(name, str(path), f"another file than {other}", "rename it: that file would be overwritten")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
