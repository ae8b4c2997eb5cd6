"""A rank that dies where it is told to: SIGKILL in a named phase of a run, at an operation on files or after a time."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STARTING, DATA, CACHED_REFERENCE, LOADING = "start", "data", "cached reference", "loading"
FIRST_STEP, STEPS, PRUNING = "first step", "steps", "pruning"
SAVES, WRITES, ASYNC_WRITES = "saves", "writes of a save", "async writes"
EXPORT = "export"
BETWEEN = "between these"

POINTS = [
    (DATA, "megadpo.train.agreement", "open_run_inputs"),
    (CACHED_REFERENCE, "megadpo.train.setup", "attach_logps"),
    (LOADING, "megadpo.train.setup", "find_resume"),
    (LOADING, "megadpo.train.policy", "load_weights"),
    (LOADING, "megadpo.train.setup", "load_training_state"),
    (STEPS, "megadpo.train.step", "Trainer.step"),
    (SAVES, "megadpo.train.saving", "begin_save"),
    (WRITES, "megadpo.checkpoint.save", "Save.write"),
    (SAVES, "megadpo.checkpoint.save", "Save.finish"),
    (PRUNING, "megadpo.checkpoint.folder", "delete"),
    (EXPORT, "megadpo.lora.export", "export"),
]
"""Phase, module, and the function in it that is the phase."""

ON_FILES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"}
"""Audit events that Python raises before it does what they say."""


@dataclass(frozen=True)
class Aim:
    """Where a rank dies."""

    phase: str
    call: int = 1
    """The first, second ... time that the rank gets there."""
    event: int | None = None
    """Before this operation on files of the phase, counted from 1; None: by time."""
    after_s: float = 0.0


@dataclass(eq=False)
class Visit:
    """One stay of a rank in a phase."""

    phase: str
    call: int
    events: int = 0
    """Operations on files so far."""
    seconds: float = 0.0


class Phases:
    """Follows a rank through its phases, and kills it at its aim."""

    def __init__(self, aim: Aim | None, log: Path) -> None:
        """log: gets the phase as a line of JSON, right before the rank dies."""
        self.visits: list[Visit] = []
        self._aim = aim
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._here = threading.local()
        self._open: list[Visit] = []
        self._calls: Counter[str] = Counter()

    def install(self, *, asynchronous: bool) -> None:
        for phase, module, name in POINTS:
            owner: Any = importlib.import_module(module)
            *path, attribute = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            if asynchronous and phase == WRITES:
                phase = ASYNC_WRITES
            setattr(owner, attribute, self._followed(phase, getattr(owner, attribute)))
        if self._aim is None or self._aim.event is not None:
            sys.addaudithook(self._on_event)
            os.fsync = self._counted(os.fsync)
        if self._aim is not None and self._aim.phase == STARTING:
            self._die_after(self._aim.after_s, Visit(STARTING, 1))

    def _followed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._visiting(phase):
                return function(*args, **kwargs)

        return call

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._on_event("open", ())
            return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def _visiting(self, phase: str) -> Iterator[None]:
        if phase == STEPS and self._calls[FIRST_STEP] == 0:
            phase = FIRST_STEP
        self._calls[phase] += 1
        visit, before = Visit(phase, self._calls[phase]), getattr(self._here, "visit", None)
        self._here.visit = visit
        self._open.append(visit)
        aim, started = self._aim, time.perf_counter()
        if aim is not None and aim.event is None and (aim.phase, aim.call) == (visit.phase, visit.call):
            self._die_after(aim.after_s, visit)
        try:
            yield
        finally:
            self._open.remove(visit)
            self._here.visit = before
            visit.seconds = time.perf_counter() - started
            self.visits.append(visit)

    def _on_event(self, name: str, arguments: object) -> None:
        visit: Visit | None = getattr(self._here, "visit", None)
        if name not in ON_FILES or visit is None:
            return
        visit.events += 1
        aim = self._aim
        if aim is not None and (aim.phase, aim.call, aim.event) == (visit.phase, visit.call, visit.events):
            self._die(visit.phase)

    def _die_after(self, seconds: float, visit: Visit) -> None:
        def sleep_and_die() -> None:
            time.sleep(seconds)
            here = self._open[-1].phase if self._open else STARTING if visit.phase == STARTING else BETWEEN
            self._die(visit.phase if visit in self._open else here)

        threading.Thread(target=sleep_and_die, daemon=True).start()

    def _die(self, phase: str) -> None:
        os.write(self._log, json.dumps({"phase": phase, "rank": int(os.environ.get("RANK", "0"))}).encode() + b"\n")
        os.kill(os.getpid(), signal.SIGKILL)


def train(config: str, overrides: list[str], aim: Aim | None, log: str) -> tuple[int, list[Visit]]:
    """`megadpo train` on one rank, to its aim or its end. Returns the exit code, and the phases it went through."""
    return _run(["train", config, *overrides], "checkpointing.async_save=true" in overrides, aim, log)


def export(checkpoints: str, folder: str, aim: Aim | None, log: str) -> tuple[int, list[Visit]]:
    """The same of `megadpo export`."""
    return _run(["export", checkpoints, folder], False, aim, log)


def _run(arguments: list[str], asynchronous: bool, aim: Aim | None, log: str) -> tuple[int, list[Visit]]:
    from megadpo.commands import main

    phases = Phases(aim, Path(log))
    phases.install(asynchronous=asynchronous)
    return main(arguments), phases.visits
