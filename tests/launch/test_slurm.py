"""launch/slurm.sh against stand-ins for Slurm's commands: what it starts, when it queues itself again, what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.distributed import REPOSITORY

JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}
SCONTROL = """
case $1 in
    show) printf 'node07\\nnode08\\n' ;;
    *) echo "$@" >> scontrol.calls ;;
esac
"""


@pytest.fixture
def slurm(tmp_path: Path):
    """Starts the script as Slurm does, from a copy in its spool and the folder of sbatch. `srun` prints its arguments, one
    a line, writes its SRUN_CPUS_PER_TASK to srun.cpus, and exits with SRUN_CODE, SRUN_SECONDS later."""
    spool, commands = tmp_path / "spool", tmp_path / "bin"
    spool.mkdir()
    commands.mkdir()
    script = Path(shutil.copy(REPOSITORY / "launch" / "slurm.sh", spool / "slurm_script"))
    srun = 'echo "${SRUN_CPUS_PER_TASK:-}" > srun.cpus; printf "%s\\n" "$@"; sleep "${SRUN_SECONDS:-0}"; exit "${SRUN_CODE:-0}"'
    for name, body in (("srun", srun), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", **environment}
        return subprocess.Popen(
            [str(script), *arguments],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    out, error = process.communicate(timeout=20)
    return process.returncode, out.splitlines(), error


def queued_again(folder: Path) -> list[str]:
    calls = folder / "scontrol.calls"
    return calls.read_text().splitlines() if calls.exists() else []


def test_one_launcher_a_node_meets_at_the_first(slurm):
    code, words, error = ended(slurm("configs/a.yaml", "dpo.seed=1 2", **JOB))
    assert code == 0, error
    assert words[:3] == ["--kill-on-bad-exit=1", "megadpo", "train"]
    options = dict(zip(words[3:13:2], words[4:13:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "123456",
        "--rdzv-endpoint": "node07:23456",
    }
    assert words[13:] == ["configs/a.yaml", "dpo.seed=1 2"]  # an argument stays one word


def test_a_steps_cores_are_the_jobs(slurm, tmp_path):
    """srun doesn't take sbatch's --cpus-per-task by itself."""
    assert ended(slurm("c.yaml", **JOB, SLURM_CPUS_PER_TASK="96"))[0] == 0
    assert (tmp_path / "srun.cpus").read_text() == "96\n"
    assert ended(slurm("c.yaml", **JOB))[0] == 0
    assert (tmp_path / "srun.cpus").read_text() == "\n"


def test_prefix_and_command(slurm):
    given = {**JOB, "MEGADPO_PREFIX": "apptainer exec x.sif", "MEGADPO_COMMAND": "evaluate"}
    _, words, _ = ended(slurm("c.yaml", **given))
    assert words[1:6] == ["apptainer", "exec", "x.sif", "megadpo", "evaluate"] and words[-1] == "c.yaml"


@pytest.mark.parametrize(("code", "asked", "again"), [
    (143, True, True), (75, True, True), (143, False, False), (2, True, False), (1, True, False), (0, True, False),
])  # fmt: skip
def test_it_queues_itself_again_after_a_save(slurm, tmp_path, code, asked, again):
    asking = ["--requeue"] if asked else []
    ended_with, words, _ = ended(slurm(*asking, "c.yaml", **JOB, SRUN_CODE=str(code)))
    assert ended_with == code and "--requeue" not in words
    assert queued_again(tmp_path) == (["requeue 123456"] if again else [])
    assert any("queued again" in line for line in words) == again


def test_scancel_ends_it_for_good(slurm, tmp_path):
    process = slurm("--requeue", "c.yaml", **JOB, SRUN_CODE="143", SRUN_SECONDS="1")
    assert process.stdout is not None and process.stdout.readline()  # srun runs
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert queued_again(tmp_path) == []


def test_without_a_config_or_a_job(slurm):
    for arguments in ((), ("--requeue",)):
        code, _, error = ended(slurm(*arguments, **JOB))
        assert code == 2 and "CONFIG" in error
    code, _, error = ended(slurm("c.yaml"))
    assert code != 0 and "sbatch" in error
