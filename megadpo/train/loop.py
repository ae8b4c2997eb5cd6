"""The training loop: step, validate, save and report, until the last step or a reason to stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping

from megadpo.checkpoint import TrainingPosition
from megadpo.config.schema import CheckpointingConfig
from megadpo.data.batches.loader import GlobalBatch
from megadpo.train.metrics_logger import MetricsLogger
from megadpo.train.progress import ProgressLine
from megadpo.train.report import not_validated_words
from megadpo.train.saving import Saver
from megadpo.train.setup import Run, position_after
from megadpo.train.step import NonFiniteLoss, StepOutcome
from megadpo.train.stop import StopWatcher


def train(run: Run, logger: MetricsLogger, progress: ProgressLine, stop: StopWatcher) -> int:
    """Trains to the end of the run. Returns the exit code: 0, or that of `stop` if it stopped early.

    All ranks call it. Raises NonFiniteLoss if the config asks for it, and SaveError; complete checkpoints stay.
    """
    saver = Saver(run, progress)
    try:
        return _train(run, logger, progress, stop, saver)
    except NonFiniteLoss:  # on every rank
        saver.end()
        raise


def _train(run: Run, logger: MetricsLogger, progress: ProgressLine, stop: StopWatcher, saver: Saver) -> int:
    dpo, saving = run.cfg.dpo, run.cfg.checkpointing
    steps_per_epoch = run.inputs.train_loader.batches_per_epoch
    position = run.position
    if position.step == 0 and dpo.val_at_start:
        position = validate(run, position, logger, progress, stop, also_log={})
        if (exit_code := stop.agreed()) is not None:
            progress.message_at_end("stopped before the first step")
            return exit_code
    started = time.perf_counter()

    while position.step < run.total_steps:
        for batch in run.inputs.train_loader.batches(position.epoch, position.batch):
            outcome = run.trainer.step(batch)
            exit_code = stop.agreed()
            ended = time.perf_counter()
            record = step_record(batch, outcome, position, ended - started)
            logged = record | run.watch.read()
            started = ended
            position = position_after(position, batches_per_epoch=steps_per_epoch, skipped=not outcome.updated)
            position = dataclasses.replace(position, metrics=record)
            progress.step(position.step, record)

            last = position.step == run.total_steps
            due = last or position.step % saving.save_period == 0
            validates = validation_due(run, position.step, last=last, save=saving.enabled and due)
            # after a signal there are 30 seconds: save at once, without validation
            if exit_code is None and validates:
                position = validate(run, position, logger, progress, stop, also_log=logged)
                exit_code = stop.agreed()
                started = time.perf_counter()
            else:
                logger.log(position.step, logged)
            saver.look(position)
            if saving.enabled and (due or exit_code is not None):
                saver.save(position, wait=last or exit_code is not None)
                started = time.perf_counter()
            if exit_code is not None and not last:
                kept = kept_words(saving, saver.newest_step)
                progress.message_at_end(f"stopped after step {position.step}, {kept}")
                return exit_code
            if last:
                if validates and (left_out := unmeasured_sets(run, position)):
                    progress.message(not_validated_words(run.cfg, position.step, left_out))
                break
    return 0


def kept_words(saving: CheckpointingConfig, newest_step: int) -> str:
    """What a run that was stopped has saved, and what comes of it when the run is started again."""
    if not saving.enabled:
        return "checkpointing is off, nothing was saved"
    newest = f"newest checkpoint: step {newest_step}"
    if not saving.save_optimizer:
        return f"{newest}; it has no optimizer state (checkpointing.save_optimizer: false), so this run can't go on from there"
    return f"{newest}; started again, it goes on from there"


def step_record(batch: GlobalBatch, outcome: StepOutcome, before: TrainingPosition, seconds: float) -> dict[str, float]:
    """The metrics that one step logs. `seconds`: the time since the end of the step before, or of the validation and save
    after that step. On a GPU a step ends with its update queued; so each step's time holds the update before it."""
    return {
        "epoch": before.epoch,
        **{f"train/{name}": value for name, value in outcome.metrics.items()},
        "train/grad_norm": outcome.grad_norm,
        "train/lr": outcome.lr,
        "train/num_pairs": batch.num_pairs,
        "train/num_tokens": batch.num_tokens,
        "train/skipped_steps": before.skipped_steps + (not outcome.updated),
        "timing/train/step_time_s": seconds,
        "timing/train/tokens_per_s": batch.num_tokens / seconds,
        "timing/train/pairs_per_s": batch.num_pairs / seconds,
    }


def validation_due(run: Run, step: int, *, last: bool, save: bool) -> bool:
    """True at the period, at the end, and before a checkpoint that is ranked by a validation metric."""
    dpo = run.cfg.dpo
    if not run.inputs.validation:
        return False
    ranked_by_validation = (run.ranking_metric or "").startswith("validation")
    by_period = dpo.val_period > 0 and step % dpo.val_period == 0
    return by_period or (last and dpo.val_at_end) or (save and ranked_by_validation)


def unmeasured_sets(run: Run, position: TrainingPosition) -> list[str]:
    """The validation sets without a metric at `position`: a stop left them out, or came before their end."""
    measured = {key.partition("/")[0] for key in position.metrics}
    return [name for name in run.inputs.validation if f"validation-{name}" not in measured]


def validate(
    run: Run,
    position: TrainingPosition,
    logger: MetricsLogger,
    progress: ProgressLine,
    stop: StopWatcher,
    *,
    also_log: Mapping[str, float | None],
) -> TrainingPosition:
    """Evaluates every validation set and logs one line for the step, with `also_log`. The returned position has the
    metrics. With a reason to stop it ends early and drops the unfinished set; the caller asks `stop` again."""
    started = time.perf_counter()
    record: dict[str, float] = {}
    for name in run.inputs.validation:
        set_started = time.perf_counter()
        try:
            metrics = run.trainer.evaluate(until_stopped(run.validation_batches(name), stop))
        except Stopped:
            progress.message(f"validation on {name} stopped early")
            break
        record |= {f"validation-{name}/{metric}": value for metric, value in metrics.items()}
        progress.validation(position.step, name, metrics, time.perf_counter() - set_started)
    if record:
        record["timing/validation/total_validation_time"] = time.perf_counter() - started
    if record or also_log:
        logger.log(position.step, {**also_log, **record})
    return dataclasses.replace(position, metrics=position.metrics | record)


class Stopped(Exception):
    """There is a reason to stop."""


def until_stopped(batches: Iterator[GlobalBatch], stop: StopWatcher) -> Iterator[GlobalBatch]:
    """`batches`, until a rank has a reason to stop; then raises Stopped. Collectives: an all-reduce for each batch."""
    for batch in batches:
        if stop.agreed() is not None:
            raise Stopped
        yield batch
