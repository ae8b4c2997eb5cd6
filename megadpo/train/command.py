"""The command behind launch/train.py: arguments, checks, and how a run ends."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence

from megadpo.config.known import Known, find_problems
from megadpo.config.load import as_written, save_resolved
from megadpo.config.metric import parse_duration_s
from megadpo.config.problems import EXIT_REFUSED, ConfigError, UserError
from megadpo.config.schema import Config
from megadpo.train.check import check, checked_config

OTHERS_WAIT_S = 20.0


def main(arguments: Sequence[str]) -> int:
    """Check or train; returns the exit code. A refusal is printed by each node's first rank."""
    options = parse(arguments)
    quiet_libraries()
    try:
        if options.check:
            return check(options.config, options.overrides, options.world_size)
        return run_training(checked_config(options.config, options.overrides, world_size()))
    except UserError as error:
        return refuse(error)


def evaluate_main(arguments: Sequence[str]) -> int:
    """The command behind launch/evaluate.py; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launch/evaluate.py", description="Evaluate a model on preference pairs.")
    parser.add_argument("config", help="YAML file, as for launch/train.py; only data.val_data_paths is read")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. policy.model_name=results/dpo/step_100")
    options = parser.parse_intermixed_args(arguments)
    quiet_libraries()
    try:
        return run_evaluating(checked_config(options.config, options.overrides, world_size(), purpose="evaluate"))
    except UserError as error:
        return refuse(error)


def world_size() -> int:
    """Ranks of this run, by what torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_evaluating(cfg: Config) -> int:
    """Set up, evaluate, tear down. Every rank."""
    from megadpo.config.grid import Grid
    from megadpo.parallel import destroy, initialize, machine, setup_device
    from megadpo.train.evaluation import run_evaluation

    device = setup_device(cfg.policy.device)
    if problems := find_problems(Known(cfg=cfg, machine=machine(device))):
        raise ConfigError(problems)
    parallel = initialize(Grid.of(cfg), device)
    exit_code = run_evaluation(cfg, parallel)
    destroy()
    return exit_code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """CONFIG.yaml, --check, --world-size and key=value overrides, in any order."""
    parser = argparse.ArgumentParser(prog="launch/train.py", description="Train a model by DPO on preference pairs.")
    parser.add_argument("config", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. dpo.max_num_steps=10")
    parser.add_argument("--check", action="store_true", help="only check config, model folder, layout and data")
    parser.add_argument("--world-size", type=int, default=None, help="with --check: the number of ranks to check for")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size is not None and not options.check:
        parser.error("--world-size goes with --check; a run takes its size from torchrun")
    if options.world_size is not None and options.world_size < 1:
        parser.error(f"--world-size {options.world_size}: say how many ranks there will be, 1 or more")
    return options


def run_training(cfg: Config) -> int:
    """Set up, train, tear down. Every rank."""
    from megadpo.config.grid import Grid
    from megadpo.parallel import destroy, initialize, machine, setup_device
    from megadpo.parallel.lifetime import signal_when_parent_ends
    from megadpo.train.loop import train
    from megadpo.train.metrics_logger import MetricsLogger
    from megadpo.train.progress import ProgressLine, print_banner
    from megadpo.train.report import banner_rows, choices
    from megadpo.train.setup import prepare
    from megadpo.train.stop import StopWatcher

    if "TORCHELASTIC_RUN_ID" in os.environ:  # without it the ranks of a torchrun that died would train on
        signal_when_parent_ends(signal.SIGTERM, os.getppid())
    device = setup_device(cfg.policy.device, tensor_parallel=cfg.policy.megatron_cfg.tensor_model_parallel_size)
    if problems := find_problems(Known(cfg=cfg, machine=machine(device))):
        raise ConfigError(problems)
    parallel = initialize(Grid.of(cfg), device)
    run = prepare(cfg, parallel)
    first = parallel.rank == 0
    must_save_by = cfg.checkpointing.checkpoint_must_save_by
    stop = StopWatcher(parallel, None if must_save_by is None else parse_duration_s(must_save_by))
    stop.install()
    chosen = choices(run)
    rows = banner_rows(run, chosen)
    run_config = {**as_written(cfg), "chosen": chosen}
    with (
        MetricsLogger(cfg.logger, enabled=first, resumed_step=run.position.step, run_config=run_config) as logger,
        ProgressLine(run.total_steps, start_step=run.position.step, enabled=first) as progress,
    ):
        if first:
            save_resolved(cfg, os.path.join(cfg.logger.log_dir, "config.yaml"), chosen)
            print_banner(rows)
        exit_code = train(run, logger, progress, stop)
    destroy()
    return exit_code


def refuse(error: UserError) -> int:
    """Print every problem on stderr, once a node; the other ranks wait so that torchrun doesn't stop the one that
    prints. A rank that is still there after that is the only one to know, and prints too. Returns EXIT_REFUSED."""
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(OTHERS_WAIT_S)
    print(f"refused, {len(error.problems)} problem(s):", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr, flush=True)
    return EXIT_REFUSED


def quiet_libraries() -> None:
    """megatron-core warns at import of every optional package it can't find; none of them matters here."""
    warnings.filterwarnings("ignore", module="megatron")
    logging.getLogger("megatron").setLevel(logging.ERROR)
