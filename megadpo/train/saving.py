"""Saves a run: at once, or during the next steps (`checkpointing.async_save`)."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megadpo.checkpoint import Save, TrainingPosition, begin_save, delete_unfinished, prune_checkpoints
from megadpo.checkpoint.writer import HostCopies
from megadpo.config.problems import SaveError
from megadpo.model.weights.convert import CARD_FILE
from megadpo.train.card import model_card
from megadpo.train.progress import ProgressLine
from megadpo.train.resume import require_owner
from megadpo.train.setup import Run

BACKGROUND_NICE = 10
"""Added to the niceness of threads that write, so that the next steps come first on a shared core."""


class Saver:
    """Saves a run. At most one checkpoint is being written at a time. All ranks call each method together."""

    def __init__(self, run: Run, progress: ProgressLine) -> None:
        self.newest_step = run.position.step
        """Step of this run's newest complete checkpoint; before the first, the step that the run started from."""
        self._run = run
        self._progress = progress
        self._folder = Path(run.cfg.checkpointing.checkpoint_dir)
        self._copies = HostCopies() if run.cfg.checkpointing.async_save else None
        self._writing: tuple[Save, threading.Thread] | None = None
        self._saving_step = self.newest_step
        self._has_failed = False
        if run.cfg.checkpointing.enabled and run.parallel.rank == 0:
            delete_unfinished(self._folder)

    def look(self, position: TrainingPosition) -> None:
        """Call it after each step. A checkpoint that every rank has written gets its name. If it failed, that is printed, and
        `position` is saved instead. Collectives: while a checkpoint is being written an all-reduce of a number, at its end
        those of `Save.finish`. Raises SaveError as `save` does."""
        if self._writing is not None and self._is_written_everywhere() and not self._finish():
            self._begin(position)

    def save(self, position: TrainingPosition, *, wait: bool) -> None:
        """Save `position`, and prune. With async_save its files are written during the next steps, unless `wait`; an earlier
        checkpoint that is still being written is waited for first. Raises SaveError on every rank if it can't be saved: with
        async_save after a second attempt, but at once if another run owns the folder."""
        if self._writing is not None and (wait or self._saving_step != position.step):
            self._finish()
        if self._writing is not None or self.newest_step == position.step:
            return
        self._begin(position)
        while (wait or self._copies is None) and not self._finish():
            self._begin(position)

    def end(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. If it can't be saved, that is printed. Raises
        SaveError if another run owns the folder."""
        if self._writing is not None:
            self._finish(last=True)

    def _begin(self, position: TrainingPosition) -> None:
        run, saving = self._run, self._run.cfg.checkpointing
        self._refuse_another_run()
        own_files: dict[str, Any] = {}
        if run.parallel.rank == 0:
            own_files = {**run.own_files, CARD_FILE: model_card(run, position).encode()}
        self._saving_step = position.step
        try:
            save = begin_save(
                self._folder,
                position,
                run.parallel,
                model=run.trainer.model_to_save(),
                optimizer=run.trainer.optimizer if saving.save_optimizer else None,
                scheduler=run.trainer.scheduler,
                hf_files=run.inputs.source.hf_files,
                own_files=own_files,
                cfg=run.cfg,
                copies=self._copies,
            )
        except SaveError as error:
            self._may_try_again(error)
            return self._begin(position)
        write = save.write if self._copies is None else partial(_with_less_priority, save.write)
        thread = threading.Thread(target=write, daemon=True)  # so that a crashed run doesn't wait for it
        thread.start()
        self._writing = save, thread

    def _is_written_everywhere(self) -> bool:
        assert self._writing is not None
        return not self._run.parallel.largest(self._writing[1].is_alive())

    def _finish(self, *, last: bool = False) -> bool:
        """True if the checkpoint is complete, False if it may be tried again. Raises SaveError for the final failure. last: it
        is not tried again, and False if it failed."""
        assert self._writing is not None
        (save, thread), self._writing = self._writing, None
        thread.join()
        try:
            save.finish(self._require_owner)
        except SaveError as error:
            self._may_try_again(error, last=last)
            return False
        self._has_failed, self.newest_step = False, self._saving_step
        if self._run.parallel.rank == 0:
            saving = self._run.cfg.checkpointing
            prune_checkpoints(
                self._folder,
                keep_top_k=saving.keep_top_k,
                metric=self._run.ranking_metric,
                higher_is_better=saving.higher_is_better,
            )
        return True

    def _may_try_again(self, error: SaveError, *, last: bool = False) -> None:
        """Returns if the save may be tried again: once, with async_save. Else raises `error`. last: only prints it."""
        self._refuse_another_run()
        if not last and (self._copies is None or self._has_failed):
            raise error
        self._has_failed = True
        what_now = "the run ends" if last else "tried again now"
        self._progress.message(f"NOT SAVED: step {self._saving_step}; {what_now}: {error}")

    def _require_owner(self) -> None:
        if self._run.owner is not None:
            require_owner(self._folder, self._run.owner)

    def _refuse_another_run(self) -> None:
        """Raises the same SaveError on every rank if another run owns the folder. Collectives: a broadcast of a pickled
        object."""
        words: list[str | None] = [None]
        try:
            self._require_owner()
        except SaveError as error:
            words = [str(error)]
        dist.broadcast_object_list(words, src=0)
        if words[0] is not None:
            raise SaveError(words[0])


def _with_less_priority(function: Callable[[], None]) -> None:
    """Lower this thread's priority, then call `function`. (On Linux threads have priorities, and threads that they start
    inherit them.)"""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + BACKGROUND_NICE)
    function()
