"""Signals: one request to stop, however often it is delivered; a later Ctrl-C means at once."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.distributed import processes, run_distributed
from tests.helpers.runs import evaluate, make_config, make_model, read_metrics, train, train_and_read
from tests.helpers.signals import exit_code_when_signalled_late

ALIVE = 7


def signalled(first: int, last: int, window_s: float) -> None:
    from megadpo.train import stop

    stop.SAME_SIGNAL_S = window_s
    stop.StopWatcher(None, None).install()  # type: ignore[arg-type]
    for number in (first, signal.SIGTERM, signal.SIGUSR1, last):
        signal.raise_signal(number)
    sys.exit(ALIVE)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(
    ("last", "window_s", "code"),
    [
        (signal.SIGINT, 10.0, ALIVE),
        (signal.SIGTERM, -1.0, ALIVE),
        (signal.SIGINT, -1.0, -signal.SIGINT),
    ],
)
def test_only_a_later_ctrl_c_ends_the_process(first, last, window_s, code):
    process = processes().Process(target=signalled, args=(int(first), int(last), window_s))
    process.start()
    process.join(120)
    assert process.exitcode == code


def test_a_signal_while_python_ends_changes_no_exit_code():
    setup = "from megadpo.train.stop import StopWatcher; StopWatcher(None, None).install()"
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    assert exit_code_when_signalled_late(setup, *numbers) == 143


def agreed_of_ranks(late: list[bool], signalled: list[bool]) -> int | None:
    """Target for run_distributed: what this rank is told."""
    import os

    import torch.distributed as dist

    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.stop import StopWatcher

    parallel = initialize(Grid(), setup_device("cpu"))
    handler = signal.getsignal(signal.SIGTERM)
    watcher = StopWatcher(parallel, deadline_s=time.monotonic() + (0.0 if late[dist.get_rank()] else 3600.0))
    watcher.install()
    if signalled[dist.get_rank()]:
        os.kill(os.getpid(), signal.SIGTERM)
    told = watcher.agreed()
    signal.signal(signal.SIGTERM, handler)
    return told


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("late", "signalled", "code"),
    [
        ([False, False], [False, False], None),
        ([False, True], [False, False], 75),
        ([True, False], [False, True], 143),  # a signal is the more urgent
    ],
)
def test_every_rank_is_told_the_most_urgent_reason_of_any(late, signalled, code):
    assert run_distributed(agreed_of_ranks, 2, late, signalled, init_process_group=False) == [code, code]


def train_and_signal_at_the_end(config: str) -> tuple[int, str]:
    """Target for run_distributed: SIGTERM comes in the last step's validation; the exit code, and what was printed."""
    from megadpo.train import loop

    validate = loop.validate

    def signalled(*given, **more):
        signal.raise_signal(signal.SIGTERM)
        return validate(*given, **more)

    loop.validate = signalled
    return train_and_read(config, [])


@pytest.mark.distributed
def test_a_stop_in_the_last_step_names_what_it_left_out_and_a_command_for_it(tmp_path):
    config = make_config(
        tmp_path,
        make_model(tmp_path / "model"),
        dpo={"max_num_steps": 1, "val_at_end": True},
        checkpointing={"enabled": True},
    )
    [(code, printed)] = run_distributed(train_and_signal_at_the_end, 1, str(config), init_process_group=False)
    assert code == 0 and "step 1 was not validated on held_out; this measures it: megadpo evaluate " in printed, printed
    config, *arguments = printed.partition("megadpo evaluate ")[2].partition(" finished:")[0].split()
    assert run_distributed(evaluate, 1, config, arguments, init_process_group=False) == [0]
    measured = json.loads((tmp_path / "logs/step_1/evaluation.json").read_text())
    assert measured["validation-held_out/pairs"] == 11 and "validation-held_out/rewards/margins" in measured


def train_when_launched_before(config: str, seconds: float) -> int:
    """Target for run_distributed: `megadpo train` of a rank whose launcher was started so long ago."""
    import os

    os.environ["MEGADPO_LAUNCHED_S"] = str(time.monotonic() - seconds)
    return train(config, ["checkpointing.checkpoint_must_save_by='00:01:00:00'"])


@pytest.mark.distributed
@pytest.mark.parametrize(("seconds", "code"), [(3600.0, 75), (0.0, 0)])
def test_the_time_to_save_by_counts_from_the_start_of_the_command(tmp_path, seconds, code):
    config = make_config(tmp_path, make_model(tmp_path / "model"), checkpointing={"enabled": True})
    assert run_distributed(train_when_launched_before, 1, str(config), seconds, init_process_group=False) == [code]
    assert len(read_metrics(tmp_path / "logs")) == (1 if code else 3)


def train_and_signal_in_validation(config: str, overrides: list[str], validations: int, closed: Path) -> int:
    """Target for run_distributed: SIGTERM comes to the last rank at its `validations`-th global batch of validation.
    closed: a file for the exit code that the loggers are closed with."""
    import torch.distributed as dist

    from megadpo.train.loggers.jsonl import JsonLines
    from megadpo.train.step import Trainer

    JsonLines.close = lambda self, exit_code: closed.write_text(str(exit_code))

    evaluate, seen = Trainer.evaluate, []

    def counted(batches):
        for batch in batches:
            seen.append(1)
            if len(seen) == validations and dist.get_rank() == dist.get_world_size() - 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    Trainer.evaluate = lambda self, batches: evaluate(self, counted(batches))
    return train(config, overrides)


@pytest.mark.distributed
def test_a_signal_in_validation_breaks_it_off_and_saves(tmp_path):
    """A set may take minutes, and torchrun grants 30 seconds."""
    config = make_config(
        tmp_path,
        make_model(tmp_path / "model"),
        dpo={"max_num_steps": 4, "val_period": 2, "val_global_batch_size": 1, "val_batches": 0},
        checkpointing={"enabled": True, "save_period": 2},
    )
    closed = tmp_path / "closed"
    codes = run_distributed(train_and_signal_in_validation, 2, str(config), [], 3, closed, init_process_group=False)
    assert codes == [143, 143] and closed.read_text() == "143"
    assert (tmp_path / "checkpoints/step_2/megadpo.json").is_file()
    assert [(r["step"], "validation-held_out/loss" in r) for r in read_metrics(tmp_path / "logs")] == [
        (1, False),
        (2, False),
    ]

    started = ["dpo.val_at_start=true", f"checkpointing.checkpoint_dir={tmp_path / 'new'}"]
    of = (str(config), started, 1, closed)
    codes = run_distributed(train_and_signal_in_validation, 2, *of, init_process_group=False)
    assert codes == [143, 143] and not list((tmp_path / "new").glob("step_*"))
