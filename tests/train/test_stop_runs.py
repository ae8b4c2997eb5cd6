"""Every way to stop a run under torchrun and under our own launcher, before and after its first save: the step reached is
saved, the next run goes on from there, and no process and no half-written folder stays behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import REPOSITORY, run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "launch/train.py")
OURS = (sys.executable, "-m", "megadpo", "train", "--nproc-per-node", "2", "--local-addr", "127.0.0.1")
MARK = "MEGADPO_TEST_RUN"


@dataclass
class Run:
    """Two ranks under a launcher. Its processes are those that inherited its mark, whoever their parent is now."""

    folder: Path
    process: subprocess.Popen[str]
    mark: str

    def processes(self) -> list[int]:
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if f"{MARK}={self.mark}\0".encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
        return found

    def ranks(self) -> list[int]:
        """torchrun makes each rank the first process of a session."""
        return [pid for pid in self.processes() if os.getsid(pid) == pid != self.process.pid]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 150
        metrics = self.folder / "logs/metrics.jsonl"
        while time.monotonic() < deadline and self.process.poll() is None:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= step:
                return
            time.sleep(0.05)
        pytest.fail(f"step {step} was not reached: {self.process.communicate()[0][-3000:]}")

    def wait_for_end(self) -> str:
        """What was printed, when the last process that could print has ended."""
        return self.process.communicate(timeout=90)[0]

    def left_behind(self) -> list[bytes]:
        deadline = time.monotonic() + 10  # a process that is to end with its parent takes a moment for it
        while (pids := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [command(pid) for pid in pids]


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    return b""


@pytest.fixture
def start(tmp_path):
    started: list[Run] = []

    def run(config: Path, launcher: Sequence[str] = TORCHRUN) -> Run:
        mark = uuid.uuid4().hex
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", MARK: mark}
        process = subprocess.Popen(
            [*launcher, str(config)],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(Run(tmp_path, process, mark))
        return started[-1]

    yield run
    for one in started:
        for pid in one.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def to_launcher(run: Run, number: signal.Signals) -> None:
    """kill, Kubernetes."""
    run.process.send_signal(number)


def to_every_process(run: Run, number: signal.Signals) -> None:
    """Slurm. torchrun then signals its ranks again."""
    for pid in run.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def ctrl_c(run: Run, number: signal.Signals) -> None:
    """To the foreground process group: the launcher's. torchrun makes a group of each rank."""
    os.killpg(run.process.pid, number)


def ctrl_c_twice(run: Run, number: signal.Signals) -> None:
    ctrl_c(run, number)
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        ctrl_c(run, number)


WAYS: dict[str, tuple[Any, signal.Signals]] = {
    "SIGTERM": (to_launcher, signal.SIGTERM),
    "SIGUSR1": (to_launcher, signal.SIGUSR1),
    "SIGTERM-to-all": (to_every_process, signal.SIGTERM),
    "SIGUSR1-to-all": (to_every_process, signal.SIGUSR1),
    "ctrl-C": (ctrl_c, signal.SIGINT),
    "ctrl-C-twice": (ctrl_c_twice, signal.SIGINT),
}
LAUNCHERS = {"torchrun": TORCHRUN, "megadpo": OURS}


FAST = {
    ("torchrun", "SIGUSR1", True),  # ends torchrun, which doesn't know it
    ("megadpo", "SIGTERM-to-all", True),
    ("megadpo", "ctrl-C-twice", False),
}
EVERY = [
    pytest.param(
        *case,
        id=f"{case[0]}-{case[1]}-{'later' if case[2] else 'first'}-save",
        marks=[] if case in FAST else pytest.mark.slow,
    )
    for case in itertools.product(LAUNCHERS, WAYS, (False, True))
]


@pytest.mark.distributed
@pytest.mark.parametrize(("launcher", "way", "saved_before"), EVERY)
def test_a_stop_saves_the_step_reached(model, tmp_path, start, launcher, way, saved_before):
    config = make_config(
        tmp_path,
        model,
        dpo={"max_num_steps": None, "max_num_epochs": 400},
        policy={"megatron_cfg": {"tensor_model_parallel_size": 2}},
        checkpointing={"enabled": True, "save_period": 3 if saved_before else 10_000},
    )
    run = start(config, LAUNCHERS[launcher])
    run.wait_for_step(5 if saved_before else 2)
    send, number = WAYS[way]
    send(run, number)
    output = run.wait_for_end()
    assert run.left_behind() == []

    stopped = read_metrics(tmp_path / "logs")[-1]["step"]
    words = f"stopped after step {stopped}, newest checkpoint: step {stopped}; started again, it goes on from there"
    if launcher == "megadpo":
        assert run.process.returncode == 143
        assert output.splitlines()[-1] == words and "Traceback" not in output, output[-3000:]
    else:
        assert run.process.returncode != 0 and words in output, output[-3000:]
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert f"step_{stopped}" in folders and not [name for name in folders if name.startswith(".")], folders

    more = [f"dpo.max_num_steps={stopped + 1}"]
    assert run_distributed(train, 2, str(config), more, init_process_group=False) == [0, 0]
    assert [r["step"] for r in read_metrics(tmp_path / "logs")] == list(range(1, stopped + 2))


@pytest.mark.distributed
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
def test_a_signal_while_the_model_is_built_waits_until_there_is_something_to_save(model, tmp_path, start, number):
    config = make_config(
        tmp_path,
        model,
        dpo={"max_num_steps": None, "max_num_epochs": 400},
        policy={"megatron_cfg": {"tensor_model_parallel_size": 2}},
        checkpointing={"enabled": True, "save_period": 10_000},
    )
    run = start(config, OURS)
    deadline = time.monotonic() + 60
    while len(run.ranks()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    to_launcher(run, number)
    output = run.wait_for_end()
    assert run.process.returncode == 143 and run.left_behind() == [], output[-3000:]
    assert output.splitlines()[-1].startswith("stopped after step 1, newest checkpoint: step 1")


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_run_and_leaves_no_process(model, tmp_path, start):
    config = make_config(
        tmp_path,
        model,
        dpo={"max_num_steps": None, "max_num_epochs": 400},
        policy={"megatron_cfg": {"tensor_model_parallel_size": 2}},  # so that each rank has something to write
        checkpointing={"enabled": True, "save_period": 1},
    )
    run = start(config)
    run.wait_for_step(3)
    ranks = run.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    died = time.monotonic()
    output = run.wait_for_end()
    assert run.process.returncode != 0 and time.monotonic() - died < 60
    assert "Signal 9 (SIGKILL)" in output
    assert run.left_behind() == []
