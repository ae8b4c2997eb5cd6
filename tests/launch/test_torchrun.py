"""launch/torchrun.sh with a stand-in for torchrun: arguments and exit code pass through, signals go to the ranks alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.distributed import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "torchrun.sh"
# Two ranks that take a second to save, which torchrun, if it were signalled, would not wait for.
TORCHRUN = f"""#!{sys.executable}
import subprocess, sys
rank = '''
import signal, sys, time
def save(*_):
    time.sleep(1)
    open(f"rank_{{sys.argv[1]}}", "w").write("saved")
    sys.exit(143)
signal.signal(signal.SIGUSR1, save)
open(f"ready_{{sys.argv[1]}}", "w").close()
time.sleep(60)
'''
ranks = [subprocess.Popen([sys.executable, "-c", rank, str(number)]) for number in range(2)]
sys.exit(max(one.wait() for one in ranks))
"""


@pytest.fixture
def start(tmp_path: Path):
    def run(body: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = tmp_path / "torchrun"
        command.write_text(body)
        command.chmod(0o755)
        env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        return subprocess.Popen([str(SCRIPT), *arguments], cwd=tmp_path, env=env)

    return run


@pytest.mark.parametrize("code", [0, 3, 143])
def test_arguments_and_exit_code_pass_through(start, tmp_path, code):
    process = start(f'#!/bin/sh\nprintf "%s\\n" "$@" > arguments\nexit {code}\n', "--nnodes", "2", "a b", "x=1")
    assert process.wait(timeout=20) == code
    assert (tmp_path / "arguments").read_text().splitlines() == ["--nnodes", "2", "a b", "x=1"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_are_signalled_and_waited_for(start, tmp_path, number):
    process = start(TORCHRUN)
    deadline = time.monotonic() + 20
    while not all((tmp_path / f"ready_{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=20) == 143
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["saved", "saved"]
