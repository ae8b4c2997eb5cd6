"""Run a function in several real processes joined by gloo, and get every rank's result back.

    def sum_of_ranks(start: int) -> int:                      # at module level, in any importable test module
        value = torch.tensor([start + torch.distributed.get_rank()])
        torch.distributed.all_reduce(value)
        return int(value)

    @pytest.mark.distributed
    def test_sum():
        assert run_distributed(sum_of_ranks, 2, 10) == [21, 21]

Processes, not threads: megatron-core keeps its groups in module globals, and its checkpoint writer forks. Ranks are
forked from a server that has imported torch and megatron-core already: that import takes most of a short test's time.
Where there is a GPU each rank imports them itself.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.helpers.distributed_worker import be_rank

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S = 0.02
GRACE_S = 1.0  # after the first failure: time for another rank to write down what it saw, before all are killed
TAIL_CHARACTERS = 4000
PRELOADED = [
    "megadpo.commands.evaluate",
    "megadpo.commands.train",
    "megadpo.train.command",
    "megadpo.train.evaluation",
    "megadpo.train.loop",
    "tests.helpers.equal_runs",
    "tests.helpers.warm",
    "transformers.models.auto.tokenization_auto",  # imported where a tokenizer is loaded, so by every rank of a run
]


class DistributedError(AssertionError):
    """A rank failed, died or timed out. The message ends with the first failing rank's traceback."""


def run_distributed(
    target: str | Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
    init_process_group: bool = True,
) -> list[Any]:
    """Calls `target(*args)` in `world_size` processes and returns their results in rank order.

    target: "package.module:function" or a module-level function; arguments and results are pickled.
    env: added to the environment of every rank (on top of what torchrun would set, and OMP_NUM_THREADS=1).
    init_process_group: False leaves `torch.distributed.init_process_group` to the target (env:// is ready for it).
    Raises DistributedError as soon as one rank fails, and after `timeout_s` with the stacks of all ranks.
    """
    from torch.distributed import TCPStore

    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    # The store lives here, on a port that the kernel picks: no free-port race between tests that run side by side.
    # Ranks join it as clients, just as torchrun's do.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="megadpo-ranks-") as folder:
        (Path(folder) / "call.pkl").write_bytes(pickle.dumps((name, args, init_process_group)))
        ranks = []
        try:
            ranks = [start_rank(r, world_size, store.port, Path(folder), env or {}) for r in range(world_size)]
            _wait(ranks, Path(folder), name, timeout_s)
        finally:
            _kill(ranks)
        return [pickle.loads((Path(folder) / f"result_{rank}.pkl").read_bytes()) for rank in range(world_size)]


def processes() -> multiprocessing.context.ForkServerContext | multiprocessing.context.SpawnContext:
    """Starts processes that have imported PRELOADED; where there is a GPU, processes that have imported nothing.
    megatron-core asks torch for GPUs when it is imported, and torch then refuses them in every forked process."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """This process's environment, and what torchrun would set for a rank that finds its store at `port`."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",  # a machine's own name needn't resolve
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 must not start a store of its own
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def start_rank(rank: int, world_size: int, port: int, folder: Path, extra: Mapping[str, str]) -> BaseProcess:
    """A rank that does the call in `folder` (call.pkl), where it leaves result_<rank>.pkl or error_<rank>.txt."""
    environment = {**rank_environment(rank, world_size, port), **extra}
    process = processes().Process(target=be_rank, args=(folder, environment))
    process.start()
    return process


def _wait(ranks: list[BaseProcess], folder: Path, name: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while None in (codes := [rank.exitcode for rank in ranks]):
        if any(codes):
            break
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.exitcode is None and rank.pid is not None:
                    os.kill(rank.pid, signal.SIGUSR1)  # the worker answers with the stacks of its threads
            time.sleep(GRACE_S)
            outputs = "\n".join(_output(folder, number) for number in range(len(ranks)))
            raise DistributedError(f"{name} on {len(ranks)} ranks: not done after {timeout_s:.0f} s\n{outputs}")
        time.sleep(POLL_S)
    if any(codes):
        time.sleep(GRACE_S)
        raise DistributedError(f"{name} on {len(ranks)} ranks: {_first_failure(ranks, folder)}")


def _first_failure(ranks: list[BaseProcess], folder: Path) -> str:
    """The traceback written first is the cause; later ones are other ranks seeing their partner gone."""
    text = ""
    failed = [number for number, rank in enumerate(ranks) if rank.exitcode]
    for number in failed:
        if not (folder / f"error_{number}.txt").exists():  # killed by a signal: no traceback, but perhaps the cause
            text += f"rank {number} ended with code {ranks[number].exitcode}\n{_output(folder, number)}\n"
    wrote = [number for number in failed if (folder / f"error_{number}.txt").exists()]
    if wrote:
        first = min(wrote, key=lambda number: (folder / f"error_{number}.txt").stat().st_mtime_ns)
        text += f"rank {first} failed\n{_output(folder, first)}\n{(folder / f'error_{first}.txt').read_text()}"
    return text


def _output(folder: Path, rank: int) -> str:
    text = (folder / f"output_{rank}.txt").read_text(errors="replace")
    return f"--- output of rank {rank} ---\n{text[-TAIL_CHARACTERS:]}"


def _kill(ranks: list[BaseProcess]) -> None:
    for rank in ranks:
        assert rank.pid is not None
        try:
            os.killpg(rank.pid, signal.SIGKILL)
        except ProcessLookupError:
            rank.kill()  # it has not come so far as to lead a group of its own, or is gone
    for rank in ranks:
        rank.join()
