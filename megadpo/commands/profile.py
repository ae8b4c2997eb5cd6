"""Show where the time of a training step goes: megadpo profile CONFIG --out FILE.png [key=value ...]

Builds the run as megadpo train does, takes --warmup steps, records --steps more with torch's profiler, and prints the
three largest costs. FILE.png shows more of them; --trace FILE.json.gz keeps the timeline for Perfetto. The run saves no
checkpoint and writes no logs. With several ranks (--nproc-per-node) each records its own steps, and rank 0 writes. Exit code
2: refused, with every problem on stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megadpo.commands import command_parser
from megadpo.config.output_files import output_problems, picture_problems
from megadpo.config.problems import ConfigError, Problem
from megadpo.launcher import add_rank_options, launch, split_rank_options, world_size
from megadpo.train.check import checked_config
from megadpo.train.refusals import before_groups


def main(arguments: Sequence[str]) -> int:
    """Profile; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("config", help="YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--trace", type=Path, help="the timeline, .json or .json.gz")
    parser.add_argument("--warmup", type=int, default=5, help="steps before recording (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="steps recorded (default: 3)")
    add_rank_options(parser)
    options = parser.parse_intermixed_args(arguments)
    ranks, own = split_rank_options(arguments)
    if ranks:
        return launch(ranks, ["profile", *own], saves=False)
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Profile and write."""
    import torch.distributed as dist

    from megadpo.parallel import destroy
    from megadpo.train.profile import draw, profile_run

    cfg = before_groups(partial(checked_config, options.config, options.overrides, world_size()))
    problems = [
        Problem(name, value, "at least 1", "raise it")
        for name, value in (("--steps", options.steps), ("--warmup", options.warmup))
        if value < 1
    ]
    problems += picture_problems("--out", options.out, [".png", ".svg"])
    problems += output_problems("--trace", options.trace)
    if problems:
        raise ConfigError(problems)
    profile = profile_run(cfg, warmup=options.warmup, steps=options.steps, trace=options.trace)
    if dist.get_rank() == 0:
        print("\n".join(profile.words()))
        draw(profile, f"{cfg.policy.model_name}, {cfg.policy.precision} on {profile.device}", options.out)
    destroy()
    return 0
