"""The tests' own tools: run_distributed must bring back results, and never hide or outwait a failure."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import DistributedError, run_distributed

pytestmark = pytest.mark.distributed


def add_over_ranks(start: int) -> dict[str, object]:
    value = torch.tensor([start + torch.distributed.get_rank()])
    torch.distributed.all_reduce(value)
    return {"sum": int(value), "rank": os.environ["LOCAL_RANK"], "threads": torch.get_num_threads()}


def fail_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        print("about to fail")
        raise ValueError("planted failure")
    time.sleep(3600)  # deaf: only the parent can end it


def die_on_rank_one(pid_folder: str) -> None:
    (Path(pid_folder) / os.environ["RANK"]).write_text(str(os.getpid()))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def wait_for_ever_on_rank_zero() -> None:
    if torch.distributed.get_rank() == 0:
        time.sleep(3600)


def read_environment(name: str) -> tuple[str | None, bool]:
    return os.environ.get(name), torch.distributed.is_initialized()


def has_asked_for_gpus() -> bool:
    return "megatron.core.dist_checkpointing.strategies.torch" in sys.modules


def test_results_come_back_in_rank_order():
    expected = [{"sum": 21, "rank": str(rank), "threads": 1} for rank in range(2)]
    assert run_distributed(f"{__name__}:add_over_ranks", 2, 10) == expected


def test_environment_and_a_process_group_left_to_the_target():
    result = run_distributed(read_environment, 1, "PLANTED", env={"PLANTED": "yes"}, init_process_group=False)
    assert result == [("yes", False)]


def test_a_rank_is_not_forked_from_a_process_that_asked_for_gpus(monkeypatch):
    """torch refuses to use a GPU in a process forked from one that counted the GPUs, as megatron-core does when imported."""
    assert run_distributed(has_asked_for_gpus, 1, init_process_group=False) == [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run_distributed(has_asked_for_gpus, 1, init_process_group=False) == [False]


def test_a_failing_rank_ends_the_run_at_once_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"(?s)rank 1 failed.*about to fail.*ValueError: planted failure"):
        run_distributed(fail_on_rank_one, 2, timeout_s=60)
    assert time.monotonic() - start < 40  # start-up and the grace, not the time limit


def test_a_killed_rank_is_named_and_the_others_are_ended(tmp_path: Path):
    with pytest.raises(DistributedError, match="rank 1 ended with code -9"):
        run_distributed(die_on_rank_one, 2, str(tmp_path), timeout_s=60)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def test_a_hanging_rank_is_ended_with_its_stack():
    run_distributed(add_over_ranks, 2, 10)  # the server of processes has started: the time below is the ranks' own
    with pytest.raises(DistributedError, match=r"(?s)not done after 5 s.*wait_for_ever_on_rank_zero"):
        run_distributed(wait_for_ever_on_rank_zero, 2, timeout_s=5)


def test_an_unknown_target_fails():
    with pytest.raises(DistributedError, match="no_such_function"):
        run_distributed(f"{__name__}:no_such_function", 1)
