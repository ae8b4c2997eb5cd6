"""When a run validates, saves and stops, what a step logs, and what a save is given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megadpo.checkpoint import TrainingPosition
from megadpo.config.schema import CheckpointingConfig, DpoConfig
from megadpo.data.batches.loader import GlobalBatch
from megadpo.train import loop
from megadpo.train.loop import kept_words, step_record, validation_due
from megadpo.train.step import NonFiniteLoss, StepOutcome


@pytest.mark.parametrize(
    ("period", "at_end", "ranked_by", "step", "last", "save", "due"),
    [
        (2, False, None, 4, False, False, True),
        (2, False, None, 3, False, False, False),
        (0, False, None, 4, False, True, False),
        (0, True, None, 3, True, False, True),
        (0, True, None, 3, False, True, False),
        (2, False, None, 3, True, True, False),
        (0, False, "validation-a/loss", 3, False, True, True),
        (0, False, "validation-a/loss", 3, True, False, False),
        (0, False, "train/loss", 3, True, True, False),
    ],
)
def test_validation_is_due(period, at_end, ranked_by, step, last, save, due):
    cfg = SimpleNamespace(dpo=DpoConfig(val_period=period, val_at_end=at_end))
    for sets in ({"a": None}, {}):
        run = SimpleNamespace(cfg=cfg, inputs=SimpleNamespace(validation=sets), ranking_metric=ranked_by)
        assert validation_due(run, step, last=last, save=save) == (due and bool(sets))


@pytest.mark.parametrize("updated", [True, False])
def test_a_step_counts_what_was_skipped_and_divides_by_its_seconds(updated):
    outcome = StepOutcome({"loss": 0.5}, grad_norm=3.0, lr=0.1, updated=updated)
    batch = GlobalBatch(micro_batches=[], num_pairs=4, num_tokens=30, pair_indices=[])
    before = TrainingPosition(step=7, epoch=1, batch=2, skipped_steps=2)
    assert step_record(batch, outcome, before, seconds=2.0) == {
        "epoch": 1,
        "train/loss": 0.5,
        "train/grad_norm": 3.0,
        "train/lr": 0.1,
        "train/num_pairs": 4,
        "train/num_tokens": 30,
        "train/skipped_steps": 2 if updated else 3,
        "timing/train/step_time_s": 2.0,
        "timing/train/tokens_per_s": 15.0,
        "timing/train/pairs_per_s": 2.0,
    }


class KeepsSaves:
    """In place of a Saver: what was to be saved, and which of it was waited for."""

    def __init__(self, saves):
        self.saves, self.waited, self.ended, self.newest_step = saves, [], 0, 0

    def look(self, position):
        pass

    def save(self, position, *, wait):
        self.saves.append(position)
        self.waited += [position.step] if wait else []
        self.newest_step = position.step

    def end(self):
        self.ended += 1


@pytest.mark.parametrize(
    ("stopped_at", "enabled", "code", "saved"),
    [
        (None, True, 0, [3, 5]),
        (2, True, 143, [2]),
        (3, True, 143, [3]),
        (5, True, 0, [3, 5]),  # the run is done all the same
        (2, False, 143, []),
        (None, False, 0, []),
    ],
)
def test_a_run_saves_by_its_period_at_its_end_and_where_it_is_stopped(stopped_at, enabled, code, saved, monkeypatch):
    """Five steps, four an epoch, of which the first was done before."""
    begun, logged, saves, said = [], [], [], []

    def batches(epoch, start):
        begun.append((epoch, start))
        for _ in range(start, 4):
            yield GlobalBatch(micro_batches=[], num_pairs=2, num_tokens=8, pair_indices=[])

    run = SimpleNamespace(
        cfg=SimpleNamespace(
            dpo=DpoConfig(val_period=1), checkpointing=CheckpointingConfig(save_period=3, enabled=enabled)
        ),
        inputs=SimpleNamespace(train_loader=SimpleNamespace(batches_per_epoch=4, batches=batches), validation={}),
        position=TrainingPosition(step=1, epoch=0, batch=1),
        total_steps=5,
        trainer=SimpleNamespace(step=lambda batch: StepOutcome({"loss": 0.5}, grad_norm=1.0, lr=0.1, updated=True)),
        ranking_metric=None,
        watch=SimpleNamespace(read=dict),
    )
    saver = KeepsSaves(saves)
    monkeypatch.setattr(loop, "Saver", lambda run, progress: saver)
    logger = SimpleNamespace(log=lambda step, record: logged.append(step))
    progress = SimpleNamespace(step=lambda step, record: None, message_at_end=said.append)
    stop = SimpleNamespace(agreed=lambda: 143 if len(logged) + 2 == stopped_at else None)  # before the step is logged
    assert loop.train(run, logger, progress, stop) == code
    assert [position.step for position in saves] == saved
    assert saver.waited == saved[-1:], "the end of a run, and a stop, wait for what is written"
    last = stopped_at if code else 5
    assert logged == list(range(2, last + 1))
    assert begun == [(0, 1), (1, 0)][: 2 if last > 4 else 1]
    assert len(said) == (code == 143) and (not said or f"step {last}" in said[0])
    if saves:
        assert saves[-1].metrics["train/loss"] == 0.5
        assert (saves[-1].epoch, saves[-1].batch) == divmod(last, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "newest checkpoint: step 7; started again, it goes on from there"),
        ({"save_optimizer": False}, "this run can't go on from there"),
        ({"enabled": False}, "nothing was saved"),
        ({"enabled": False, "save_optimizer": False}, "nothing was saved"),
    ],
)
def test_what_comes_of_a_stopped_run(options, words):
    assert kept_words(CheckpointingConfig(**options), 7).endswith(words)


def test_a_steps_time_goes_from_end_to_end_without_validation_and_saving(monkeypatch):
    """On a GPU the update is only queued when a step ends, and is in the next one's time, which begins there."""
    now_s, records = [0.0], []

    def takes(seconds, result=None):
        def work(*_, **__):
            now_s[0] += seconds
            return result

        return work

    def batches(epoch, start):
        for _ in range(start, 3):
            takes(0.5)()
            yield GlobalBatch(micro_batches=[], num_pairs=2, num_tokens=8, pair_indices=[])

    def validate(run, position, *_, also_log):
        records.append(also_log)
        return takes(100.0, position)()

    outcome = StepOutcome({"loss": 0.5}, grad_norm=1.0, lr=0.1, updated=True)
    run = SimpleNamespace(
        cfg=SimpleNamespace(
            dpo=DpoConfig(val_period=2, val_at_start=True), checkpointing=CheckpointingConfig(save_period=3)
        ),
        inputs=SimpleNamespace(
            train_loader=SimpleNamespace(batches_per_epoch=3, batches=batches), validation={"a": None}
        ),
        position=TrainingPosition(step=0, epoch=0, batch=0),
        total_steps=5,
        trainer=SimpleNamespace(step=takes(4.0, outcome)),
        ranking_metric=None,
        watch=SimpleNamespace(read=dict),
    )
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr(loop, "validate", validate)
    saver = SimpleNamespace(look=lambda position: None, save=takes(1000.0), newest_step=0)
    monkeypatch.setattr(loop, "Saver", lambda run, progress: saver)

    def log(step, record):
        takes(0.25)()
        records.append(record)

    progress = SimpleNamespace(step=takes(0.125), message=None)
    assert loop.train(run, SimpleNamespace(log=log), progress, SimpleNamespace(agreed=takes(2.0))) == 0
    times = [record["timing/train/step_time_s"] for record in records[1:]]  # the first: validation at the start
    # data, step, wait; after a step that was neither validated nor saved also its line and its log
    assert times == [6.5, 6.5 + 0.375, 6.5, 6.5, 6.5]
    assert records[2]["timing/train/pairs_per_s"] == 2 / 6.875


def test_a_loss_that_ends_the_run_lets_the_save_on_its_way_end(monkeypatch):
    def fails(*_):
        raise NonFiniteLoss("nan")

    saver = KeepsSaves([])
    monkeypatch.setattr(loop, "Saver", lambda run, progress: saver)
    monkeypatch.setattr(loop, "_train", fails)
    with pytest.raises(NonFiniteLoss):
        loop.train(None, None, None, None)
    assert saver.ended == 1
