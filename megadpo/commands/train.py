"""Train a model on preference pairs: megadpo train CONFIG [key=value ...]

CONFIG is a YAML file or the name of a shipped config. The command is the same on CPUs and GPUs. It runs in one process, in
N processes with --nproc-per-node N, or under torchrun (torchrun --nproc-per-node N launch/train.py CONFIG ..., or -m megadpo
train CONFIG ...). A run started again with the same checkpointing.checkpoint_dir continues from its newest checkpoint.

Exit code 0: done; 2: refused, with every problem on stderr; 74: a checkpoint could not be saved; 75 and 143: stopped; started
again it goes on from the newest checkpoint, or from the beginning where none was saved; 130: stopped by Ctrl-C before there
was anything to save; any other: a crash. docs/running.md says what to do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial

from megadpo.commands import command_parser, positive
from megadpo.config.load import load_config
from megadpo.launcher import add_rank_options, launch, launched_s, split_rank_options, world_size
from megadpo.train.check import asked_world_size, check, checked_config
from megadpo.train.refusals import before_groups


def main(arguments: Sequence[str]) -> int:
    """Check or train; returns the exit code. Raises UserError."""
    started_s = time.monotonic()  # before torch is imported, and before nodes wait for each other
    options = parse(arguments)
    if options.check:
        return check(options.config, options.overrides, asked_world_size(options))
    ranks, own = split_rank_options(arguments)
    if ranks:
        load_config(options.config, options.overrides)  # an error is printed here, not by every rank
        return launch(ranks, ["train", *own], saves=True)
    cfg = before_groups(partial(checked_config, options.config, options.overrides, world_size()))
    from megadpo.train.command import run_training  # imports torch: --help and refusals don't need it

    return run_training(cfg, started_s=launched_s() or started_s)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """CONFIG, --check, --world-size, torchrun's options and key=value overrides, in any order."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("config", help="YAML file, or the name of a shipped config such as dpo_megatron")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. dpo.max_num_steps=10")
    parser.add_argument("--check", action="store_true", help="only check; the same as megadpo check")
    parser.add_argument(
        "--world-size", type=positive, help="with --check, and without the options below: the number of ranks"
    )
    add_rank_options(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and not options.check:
        parser.error("--world-size goes with --check; a run takes its size from --nproc-per-node or torchrun")
    return options
