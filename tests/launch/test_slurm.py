"""launch/slurm.sh against stand-ins for Slurm's commands: which torchrun it starts, and what it refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.distributed import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "slurm.sh"
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "4",
}


@pytest.fixture
def slurm(tmp_path: Path):
    """Runs the script with `srun` printing its arguments, one a line, and `scontrol` naming two nodes."""
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "printf 'node07\\nnode08\\n'")):
        command = tmp_path / name
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment}
        return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True)

    return run


def test_one_torchrun_a_node_meets_at_the_first(slurm):
    done = slurm("configs/a.yaml", "dpo.seed=1 2", **JOB)
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    assert words[:2] == ["--kill-on-bad-exit=1", "launch/torchrun.sh"]
    options = dict(zip(words[2:12:2], words[3:12:2], strict=True))
    assert options == {
        "--nnodes": "2",
        "--nproc-per-node": "4",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "123456",
        "--rdzv-endpoint": "node07:23456",
    }
    assert words[12:] == ["launch/train.py", "configs/a.yaml", "dpo.seed=1 2"]  # an argument stays one word


def test_prefix_and_entry(slurm):
    done = slurm("c.yaml", **JOB, MEGADPO_PREFIX="apptainer exec x.sif", MEGADPO_ENTRY="launch/evaluate.py")
    words = done.stdout.splitlines()
    assert words[1:5] == ["apptainer", "exec", "x.sif", "launch/torchrun.sh"]
    assert words[-2:] == ["launch/evaluate.py", "c.yaml"]


def test_without_a_config_or_a_job(slurm):
    done = slurm(**JOB)
    assert done.returncode == 2 and "CONFIG.yaml" in done.stderr
    done = slurm("c.yaml")
    assert done.returncode != 0 and "sbatch" in done.stderr
