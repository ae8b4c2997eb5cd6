"""Evaluate a model on preference pairs: megadpo evaluate CONFIG [key=value ...] [--checkpoint FOLDER ...]

Measures preference accuracy, margins and losses of policy.model_name (a Hugging Face folder, a hub name or a Megatron
checkpoint, in any layout) on every set of data.val_data_paths, and on the pairs that data.holdout takes out of the training
data. dpo.reference.model_name, if set, is the reference. Writes evaluation.json and pairs-<name>.jsonl to logger.log_dir.
--checkpoint FOLDER replaces policy.model_name: FOLDER is a checkpoint, or a run's folder, which means all checkpoints in it.
Each writes to a folder of its name in log_dir, and a table compares them. Runs in one process, with --nproc-per-node N, or
under torchrun (-m megadpo evaluate ...).
Exit code 0: done; 2: refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megadpo.commands import command_parser
from megadpo.config.problems import Attempts
from megadpo.config.schema import Config
from megadpo.launcher import add_rank_options, launch, split_rank_options, world_size
from megadpo.train.check import checked_config
from megadpo.train.refusals import before_groups


def main(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument(
        "config", help="YAML file, or the name of a shipped config; data.train_data_path is read only for data.holdout"
    )
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. policy.model_name=results/dpo/step_100")
    parser.add_argument(
        "--checkpoint", action="append", type=Path, default=[], metavar="FOLDER", help="may be given several times"
    )
    add_rank_options(parser)
    options = parser.parse_intermixed_args(arguments)
    ranks, own = split_rank_options(arguments)
    if ranks:
        return launch(ranks, ["evaluate", *own], saves=False)
    configs = before_groups(partial(_configs, options))
    from megadpo.train.command import run_evaluating  # imports torch: --help and refusals don't need it

    return run_evaluating(configs)


def _configs(options: argparse.Namespace) -> list[Config]:
    """One config for each evaluation. Raises UserError with the problems of all of them."""
    checked = partial(checked_config, options.config, world_size=world_size(), purpose="evaluate")
    if not options.checkpoint:
        return [checked(options.overrides)]
    from megadpo.checkpoint.choose import checkpoints_in

    attempt = Attempts()
    found = [one for folder in options.checkpoint for one in attempt(partial(checkpoints_in, folder)) or []]
    attempt.refuse()
    above = Path(os.path.commonpath([folder.absolute().parent for folder in found]))
    configs = []
    for folder in dict.fromkeys(found):
        cfg = attempt(partial(checked, [*options.overrides, f"policy.model_name={json.dumps(str(folder))}"]))
        if cfg is not None:
            log_dir = str(Path(cfg.logger.log_dir) / folder.absolute().relative_to(above))
            configs.append(dataclasses.replace(cfg, logger=dataclasses.replace(cfg.logger, log_dir=log_dir)))
    attempt.refuse()
    return configs
