"""Plan a run on a laptop, without weights: megadpo plan CONFIG --world-size N [key=value ...]

Prints the memory of every pipeline stage and the schedule; --suggest finds better layouts.

    megadpo plan dpo_megatron --world-size 8
    megadpo plan CONFIG.yaml policy.model_name=folder-with-config.json --world-size 512 --gpu h200 --suggest

See docs/planning.md. Exit code 0: it fits; 2: refused, every problem on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megadpo.commands import command_parser
from megadpo.config.load import load_config
from megadpo.config.no_effect import without_experts
from megadpo.config.output_files import picture_problems
from megadpo.config.problems import ConfigError, Problem
from megadpo.plan.inputs import architectures, choose_pairs
from megadpo.plan.memory import GPUS, parse_assumptions
from megadpo.plan.plan import Job, Plan, make_plan, too_large
from megadpo.plan.report import (
    draw,
    plan_json,
    print_plan,
    suggestions_json,
    suggestions_table,
    text_grid,
)
from megadpo.plan.suggest import Suggestion, suggest

SUGGESTIONS = 3


def main(arguments: Sequence[str]) -> int:
    """Print a plan; returns the exit code. Raises UserError."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    options = parse(arguments)
    job = prepare(options)
    return search(job, options) if options.suggest is not None else show(job, options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__name__, __doc__)
    parser.add_argument("config", help="YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. policy.model_name=folder-with-config.json")
    parser.add_argument("--world-size", type=int, required=True, help="ranks, as many as GPUs")
    parser.add_argument("--gpu", choices=sorted(GPUS), default=None, help="default: h100 (policy.device cpu: none)")
    parser.add_argument(
        "--lengths",
        help="PROMPT,CHOSEN,REJECTED tokens of every pair, instead of reading the data; more answers make all of their pairs",
    )
    parser.add_argument("--assume", action="append", default=[], metavar="NAME=VALUE", help="see docs/planning.md")
    parser.add_argument(
        "--suggest",
        type=int,
        nargs="?",
        const=SUGGESTIONS,
        default=None,
        metavar="N",
        help=f"show the N (default {SUGGESTIONS}) best layouts for this world instead of the config's own",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg|png", help="draw the layout")
    return parser.parse_intermixed_args(arguments)


def prepare(options: argparse.Namespace) -> Job:
    """The job to plan. Raises UserError with the problems of the options, the config, the model's config.json or the data."""
    problems = list(picture_problems("--picture", options.picture, [".svg", ".png"]))
    if options.world_size < 1:
        problems.append(Problem("--world-size", options.world_size, "1 or more", "say how many ranks there will be"))
    if options.suggest is not None and options.suggest < 1:
        problems.append(Problem("--suggest", options.suggest, "1 or more", "say how many layouts to show"))
    try:
        assumed = parse_assumptions(options.assume)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    cfg = load_config(options.config, options.overrides)
    on_cpu = cfg.policy.device == "cpu"
    if on_cpu and (options.gpu or options.suggest is not None):
        what = "--gpu" if options.gpu else "--suggest"
        fix = f"add policy.device=auto, or leave {what} out: a CPU's memory has no limit here"
        raise ConfigError(Problem("policy.device", "cpu", f"auto or cuda with {what}", fix))
    arch, reference = architectures(cfg)
    cfg = without_experts(cfg, arch, reference or arch)
    pairs, origin = choose_pairs(cfg, options.lengths)
    return Job(
        cfg=cfg,
        arch=arch,
        reference=reference,
        world_size=options.world_size,
        gpu=None if on_cpu else GPUS[options.gpu or "h100"],
        assumed=assumed,
        pairs=pairs,
        origin=origin,
    )


def show(job: Job, options: argparse.Namespace) -> int:
    """Show the config's own layout. Raises ConfigError afterwards if it doesn't fit."""
    plan = make_plan(job)
    if options.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        console = terminal()
        print_plan(plan, console)
        console.print(text_grid(plan), highlight=False)
    picture(plan, options.picture)
    problems = too_large(plan)
    if problems:
        raise ConfigError(problems)
    return 0


def search(job: Job, options: argparse.Namespace) -> int:
    """Show the best layouts for this world size; --picture draws the first."""
    found = suggest(job, options.config, options.overrides, options.suggest)
    if options.json:
        print(json.dumps(suggestions_json(found), indent=2))
    else:
        print_suggestions(found)
    picture(found[0].plan, options.picture)
    return 0


def print_suggestions(found: Sequence[Suggestion]) -> None:
    console = terminal()
    console.print(suggestions_table(found))
    print_plan(found[0].plan, console)
    for rank, one in enumerate(found, 1):
        console.print(f"{rank}: {' '.join(one.overrides)}", highlight=False, soft_wrap=True)


def terminal() -> Console:
    """A console as wide as the terminal; in a file, wide enough that no line is broken."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def picture(plan: Plan, path: Path | None) -> None:
    if path is not None:
        draw(plan, path)
        print(f"drawn: {path}", file=sys.stderr)
