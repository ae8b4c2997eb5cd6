"""The command behind launch/train.py: arguments, checks, and how a run ends."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence

from megadpo.config.check import check_layout
from megadpo.config.known import Known, find_problems
from megadpo.config.load import Purpose, as_dict, load_config, save_resolved
from megadpo.config.metric import parse_duration_s
from megadpo.config.no_effect import unused_by_dense
from megadpo.config.problems import EXIT_REFUSED, ConfigError, UserError
from megadpo.config.schema import Config
from megadpo.families import read_architecture
from megadpo.train.check import check

OTHERS_WAIT_S = 20.0


def main(arguments: Sequence[str]) -> int:
    """Check or train; returns the exit code. A refusal is printed by each node's first rank."""
    options = parse(arguments)
    quiet_libraries()
    try:
        world_size = options.world_size or (None if options.check else int(os.environ.get("WORLD_SIZE", "1")))

        def checked() -> Config:
            return checked_config(options.config, options.overrides, world_size)

        return check(options.config, options.overrides, checked) if options.check else run_training(checked())
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
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        cfg = checked_config(options.config, options.overrides, world_size, purpose="evaluate")
        return run_evaluating(cfg)
    except UserError as error:
        return refuse(error)


def run_evaluating(cfg: Config) -> int:
    """Set up, evaluate, tear down. Every rank."""
    from megadpo.parallel import destroy, initialize, layout_of, machine, setup_device
    from megadpo.train.evaluation import run_evaluation

    device = setup_device(cfg.policy.device)
    if problems := find_problems(Known(cfg=cfg, machine=machine(device))):
        raise ConfigError(problems)
    parallel = initialize(layout_of(cfg), device)
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


def checked_config(path: str, overrides: Sequence[str], world_size: int | None, purpose: Purpose = "train") -> Config:
    """The config, held against the model's config.json and the world. Raises ConfigError with every problem."""
    from megadpo.model.freeze import freeze_problems
    from megadpo.model.source import reference_source, resolve_source
    from megadpo.model.weights import linked_out

    cfg = load_config(path, overrides, purpose=purpose)
    source = resolve_source(cfg.policy.model_name, "policy.model_name")
    arch = read_architecture(source.hf_files)
    problems = check_layout(cfg, arch, world_size) + freeze_problems(cfg.policy.freeze, arch)
    if (reference := reference_source(cfg, source)) != source:
        # the reference runs in the policy's layout, so its own shape must allow that too
        for one in check_layout(cfg, read_architecture(reference.hf_files, "dpo.reference.model_name"), None):
            problems.append(dataclasses.replace(one, expected=f"{one.expected} (dpo.reference.model_name's)"))
    if purpose == "train" and cfg.checkpointing.enabled:
        problems += linked_out(source.hf_files)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(cfg, notes=(*cfg.notes, *unused_by_dense(cfg, arch)))


def run_training(cfg: Config) -> int:
    """Set up, train, tear down. Every rank."""
    from megadpo.parallel import destroy, initialize, layout_of, machine, setup_device
    from megadpo.parallel.lifetime import signal_when_parent_ends
    from megadpo.train.loop import train
    from megadpo.train.metrics_logger import MetricsLogger
    from megadpo.train.progress import ProgressLine, print_banner
    from megadpo.train.report import choices, summarise
    from megadpo.train.setup import prepare
    from megadpo.train.stop import StopWatcher

    if (
        "TORCHELASTIC_RUN_ID" in os.environ
    ):  # the ranks of a torchrun that died would train on, with nobody to stop them
        signal_when_parent_ends(signal.SIGTERM, os.getppid())
    device = setup_device(cfg.policy.device, tensor_parallel=cfg.policy.megatron_cfg.tensor_model_parallel_size)
    if problems := find_problems(Known(cfg=cfg, machine=machine(device))):
        raise ConfigError(problems)
    parallel = initialize(layout_of(cfg), device)
    run = prepare(cfg, parallel)
    first = parallel.rank == 0
    must_save_by = cfg.checkpointing.checkpoint_must_save_by
    stop = StopWatcher(parallel, None if must_save_by is None else parse_duration_s(must_save_by))
    stop.install()
    summary, chosen = summarise(run), choices(run)
    run_config = {**as_dict(cfg), "chosen": chosen}
    with (
        MetricsLogger(cfg.logger, enabled=first, resumed_step=run.position.step, run_config=run_config) as logger,
        ProgressLine(run.total_steps, start_step=run.position.step, enabled=first) as progress,
    ):
        if first:
            save_resolved(cfg, os.path.join(cfg.logger.log_dir, "config.yaml"), chosen)
            print_banner(summary)
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
