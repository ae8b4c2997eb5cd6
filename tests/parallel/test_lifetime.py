"""A rank ends with the torchrun that started it."""

from __future__ import annotations

import multiprocessing
import os
import select
import time

import pytest

from megadpo.parallel.lifetime import end_with_launcher
from megadpo.train import command, profile


def start_a_rank(started: str, with_torchrun: bool) -> None:
    if os.fork():
        time.sleep(60)
    if with_torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
    end_with_launcher()
    open(started, "w").close()
    time.sleep(6)
    os._exit(0)


@pytest.mark.parametrize("with_torchrun", [True, False])
def test_a_rank_ends_with_its_launcher(tmp_path, monkeypatch, with_torchrun):
    """The pipe has no more writer when both have ended."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ended, alive = os.pipe()
    started = tmp_path / "started"
    launcher = multiprocessing.get_context("fork").Process(target=start_a_rank, args=(str(started), with_torchrun))
    launcher.start()
    os.close(alive)
    while not started.exists():
        time.sleep(0.02)
    launcher.kill()
    launcher.join()
    readable, _, _ = select.select([ended], [], [], 1.5)
    os.close(ended)
    assert bool(readable) == with_torchrun


@pytest.mark.parametrize(
    ("module", "run"),
    [
        (command, lambda: command.run_training(None, started_s=0.0)),
        (command, lambda: command.run_evaluating([])),
        (profile, lambda: profile.profile_run(None, warmup=1, steps=1, trace=None)),
    ],
    ids=["training", "evaluation", "profile"],
)
def test_ranks_of_every_command_do_so_first(module, run, monkeypatch):
    class Called(Exception):
        pass

    def called() -> None:
        raise Called

    monkeypatch.setattr(module, "end_with_launcher", called)
    with pytest.raises(Called):
        run()
