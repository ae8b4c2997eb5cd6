"""Ranks started by the command itself: which options are torchrun's, the exit code, and whose words come last."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from megadpo import launcher
from megadpo.launcher import launch, launched_s, split_rank_options
from tests.helpers.distributed import REPOSITORY
from tests.helpers.runs import make_config, make_model
from tests.helpers.signals import exit_code_when_signalled_late

TORCHRUN = ("-m", "torch.distributed.run", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "launch/train.py")
OURS = ("-m", "megadpo", "train", "--nproc-per-node", "2", "--local-addr=127.0.0.1")


def test_options_of_torchrun_are_taken_out_wherever_they_stand() -> None:
    given = ["c.yaml", "--nproc-per-node", "4", "dpo.seed=1", "--nnodes=2", "--check", "--rdzv-endpoint", "a:1"]
    ranks, others = split_rank_options(given)
    assert ranks == ["--nproc-per-node", "4", "--nnodes", "2", "--rdzv-endpoint", "a:1"]
    assert others == ["c.yaml", "dpo.seed=1", "--check"]
    assert split_rank_options(["c.yaml", "--nproc"]) == ([], ["c.yaml", "--nproc"])  # no abbreviations


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Both streams as they come on a terminal."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )


@contextlib.contextmanager
def first_of_two() -> Iterator[tuple[list[str], Callable[[], None]]]:
    """Options of the first of two nodes, and a function that returns when it waits for the other."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(address):
                return
            time.sleep(0.05)

    yield ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{address[1]}"], wait


@contextlib.contextmanager
def second_of_two() -> Iterator[tuple[list[str], Callable[[], None]]]:
    """The same of the second, whose main thread waits in C++."""
    with socket.create_server(("127.0.0.1", 0)) as first, contextlib.ExitStack() as accepted:
        first.settimeout(60)

        def wait() -> None:
            accepted.enter_context(first.accept()[0])

        port = str(first.getsockname()[1])
        yield ["--node-rank", "1", "--master-addr", "127.0.0.1", "--master-port", port], wait


@pytest.mark.parametrize(
    ("node", "number", "code"),
    [
        (first_of_two, signal.SIGUSR1, 143),
        pytest.param(first_of_two, signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(first_of_two, signal.SIGINT, 130, marks=pytest.mark.slow),
        (second_of_two, signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_a_node_that_waits_for_others(
    node: Callable[[], contextlib.AbstractContextManager[tuple[list[str], Callable[[], None]]]],
    number: signal.Signals,
    code: int,
) -> None:
    with node() as (options, wait):
        command = [sys.executable, "-m", "megadpo", "train", "--nnodes", "2", "--nproc-per-node", "1", *options, "demo"]
        with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait()
                time.sleep(1)
                process.send_signal(number)
                _, printed = process.communicate(timeout=20)
            finally:
                process.kill()
    assert process.returncode == code and printed.endswith("before there was a rank\n"), printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_python_ends_changes_no_exit_code(number: signal.Signals) -> None:
    setup = "from megadpo.launcher import _signal_the_ranks_instead; _signal_the_ranks_instead()"
    assert exit_code_when_signalled_late(setup, number) == 143


def test_ranks_are_told_when_the_launcher_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGADPO_LAUNCHED_S", "0")  # and is restored
    monkeypatch.setattr(launcher, "_end_while_there_is_no_rank", lambda: None)
    told: list[float | None] = []
    monkeypatch.setattr("torch.distributed.run.run", lambda options: told.append(launched_s()))
    before_s = time.monotonic()
    assert launch([], ["train"], saves=False) == 0
    assert told[0] is not None and before_s <= told[0] <= time.monotonic()


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A config that only a rank can refuse: it takes the model's folder to see it."""
    folder = tmp_path_factory.mktemp("run")
    config = make_config(folder, make_model(folder / "model", num_key_value_heads=1))
    return [str(config), "policy.megatron_cfg.tensor_model_parallel_size=2"]


@pytest.mark.distributed
def test_a_refusal_is_the_last_thing_on_the_terminal(refused: list[str]) -> None:
    done = run(*OURS, *refused)
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-2] == "refused, 1 problem(s):", done.stdout
    assert "1 key-value heads" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.distributed
def test_below_torchrun_its_table_ends_with_our_words(refused: list[str]) -> None:
    done = run(*TORCHRUN, *refused)
    assert done.returncode == 1
    assert (
        "refused, 1 problem(s):" in done.stdout.splitlines()[-3] and "key-value heads" in done.stdout.splitlines()[-2]
    )


def test_what_needs_no_rank_is_refused_before_there_is_one() -> None:
    done = run(*OURS, "dpo_megatron", "dpo.seed=x")
    assert done.returncode == 2 and done.stdout.startswith("refused, 1 problem(s):\n  dpo.seed: got 'x'")
