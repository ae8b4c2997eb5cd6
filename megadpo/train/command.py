"""What `megadpo train` and `megadpo evaluate` do on a rank, once the config is checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

import torch

from megadpo.config.grid import Grid
from megadpo.config.known import Known, find_problems
from megadpo.config.load import as_written, save_resolved
from megadpo.config.metric import parse_duration_s
from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.parallel import destroy, initialize, machine, setup_device
from megadpo.parallel.lifetime import end_with_launcher
from megadpo.train.evaluation import run_evaluation
from megadpo.train.loop import train
from megadpo.train.metrics_logger import MetricsLogger
from megadpo.train.progress import ProgressLine, print_banner
from megadpo.train.refusals import before_groups
from megadpo.train.report import banner_rows, choices, closing_words
from megadpo.train.setup import RunFinished, prepare
from megadpo.train.stop import StopWatcher


def run_evaluating(configs: Sequence[Config]) -> int:
    """Set up, evaluate each config's policy, tear down. Every rank."""
    end_with_launcher()
    cfg = configs[0]
    device = before_groups(partial(_checked_device, cfg))
    parallel = initialize(Grid.of(cfg), device)
    exit_code = run_evaluation(configs, parallel)
    destroy()
    return exit_code


def run_training(cfg: Config, *, started_s: float) -> int:
    """Set up, train, tear down. Every rank. started_s: time.monotonic() when the command began, from which
    checkpointing.checkpoint_must_save_by counts."""
    end_with_launcher()
    device = before_groups(partial(_checked_device, cfg))
    parallel = initialize(Grid.of(cfg), device)
    first = parallel.rank == 0
    try:
        run = prepare(cfg, parallel)
    except RunFinished as before:
        if first:
            print("\n".join([*before.notes, *closing_words(cfg, before.step, done_before=True)]), flush=True)
        destroy()
        return 0
    must_save_by = cfg.checkpointing.checkpoint_must_save_by
    stop = StopWatcher(parallel, None if must_save_by is None else started_s + parse_duration_s(must_save_by))
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
            for note in logger.notes:
                progress.message(note)
        exit_code = logger.exit_code = train(run, logger, progress, stop)
    if first and exit_code == 0:
        print("\n".join(closing_words(cfg, run.total_steps)), flush=True)
    destroy()
    return exit_code


def _checked_device(cfg: Config) -> torch.device:
    """`setup_device`. Raises ConfigError also for what this machine can't do."""
    device = setup_device(cfg.policy.device)
    if problems := find_problems(Known(cfg=cfg, machine=machine(device))):
        raise ConfigError(problems)
    return device
