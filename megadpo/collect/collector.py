"""Runs the collection: each worker takes a rollout, asks the model, gets the reward, and writes it to the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from megadpo.collect.client import RolloutFailure
from megadpo.collect.journal import Journal, Key
from megadpo.collect.parameters import Body
from megadpo.collect.policy import Policy
from megadpo.collect.progress import CollectProgress
from megadpo.collect.rewards import Score
from megadpo.collect.tasks import PARAMS, ROLLOUT_INDEX, TASK_INDEX, Tasks
from megadpo.files.jsonl import to_line


@dataclass
class Collector:
    """A collection. `run` collects the rollouts that are not in the journal yet."""

    tasks: Tasks
    policy: Policy
    score: Score
    journal: Journal
    failures: BinaryIO
    """Gets one line for each failed rollout."""
    progress: CollectProgress
    parallel: int
    add_seed: bool
    stop_after_failures: int
    stopped: bool = False
    """True if too many failures in a row have ended it early."""
    _failures_in_a_row: int = field(default=0, init=False)

    async def run(self) -> None:
        """Collects. Failed rollouts are written to `failures`. Other errors (a full disk, cancellation) end the run with
        their exception; finished rollouts are in the journal."""
        pending = self._pending()
        workers = [asyncio.create_task(self._work(pending)) for _ in range(self.parallel)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    def _pending(self) -> Iterator[Body]:
        """Missing rollouts as rows without response, task by task, so that an interrupted run has whole groups."""
        for task in self.tasks.tasks:
            for rollout in range(task.repeats):
                if (task.index, rollout) not in self.journal.done:
                    yield task.rollout_row(rollout, add_seed=self.add_seed)

    async def _work(self, pending: Iterator[Body]) -> None:
        for row in pending:  # shared: each row goes to one worker
            if self.stopped:
                return
            try:
                await self._collect_one(row)
                self._failures_in_a_row = 0
            except RolloutFailure as failure:
                self._note_failure(row, failure)

    async def _collect_one(self, row: Body) -> None:
        key: Key = (row[TASK_INDEX], row[ROLLOUT_INDEX])
        response = self.journal.answers.get(key)
        if response is None:
            response = await self.policy.answer(row[PARAMS])
        row = {**row, "response": response}
        try:
            reward = await self.score(row)
        except (RolloutFailure, asyncio.CancelledError):
            self.journal.add_answer(key, response)  # the next run computes only the reward, not the answer again
            raise
        fixed = {name: row[name] for name in (TASK_INDEX, ROLLOUT_INDEX, "agent_ref") if name in row}
        await self.journal.add({**row, **reward, **fixed})
        self.progress.finished(reward["reward"])

    def _note_failure(self, row: Body, failure: RolloutFailure) -> None:
        found = {"reason": failure.reason, "status": failure.status, "attempts": failure.attempts}
        self.failures.write(to_line({**row, "_ng_failure_class": failure.kind, "failure": found}))
        self.failures.flush()
        self._failures_in_a_row += 1
        self.progress.failure()
        if self.progress.failed == 1:
            self.progress.message(f"first failure: {failure.reason}")
        if self._failures_in_a_row >= self.stop_after_failures and not self.stopped:
            self.stopped = True
            self.progress.message(f"stopping: {self._failures_in_a_row} rollouts in a row failed ({failure.reason})")
