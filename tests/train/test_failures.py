"""What goes wrong in a run: a clear error, the right exit code, and nothing lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import DistributedError, run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train

REPOSITORY = Path(__file__).resolve().parents[2]
SAVING = {"enabled": True, "save_period": 1}


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def launch(config: Path, *overrides: str, ranks: int = 1, launcher: Sequence[str] = TORCHRUN) -> subprocess.Popen[str]:
    command = [*launcher, "--standalone", "--nproc-per-node", str(ranks)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where torchrun is
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [*command, "launch/train.py", str(config), *overrides],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "logs/metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached: {process.communicate()[0][-3000:]}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def test_check_lists_every_problem_and_exits_2(model, tmp_path):
    config = make_config(tmp_path, model)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n{broken\n')
    check = [sys.executable, "launch/train.py", str(config), "--check"]
    rows = ["train.jsonl:1", "train.jsonl:2"]
    for overrides, expected in (
        (["dpo.max_num_step=3", "policy.precision=half"], ["dpo.max_num_step", "max_num_steps", "policy.precision"]),
        (
            ["--world-size", "3", "policy.megatron_cfg.tensor_model_parallel_size=3"],
            ["attention heads", "vocab", *rows],
        ),
        ([], rows),
        (["policy.model_name=/no/such/folder"], ["policy.model_name", "/no/such/folder", *rows]),
        (["policy.tokenizer.name=/no/such/folder"], ["policy.tokenizer.name", *rows]),
        (["--world-size", "0"], ["--world-size 0"]),
    ):
        done = subprocess.run([*check, *overrides], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2, done.stderr
        for words in expected:
            assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_check_lists_what_fits_in_no_batch_of_every_set(model, tmp_path, capsys):
    from megadpo.train.command import main

    config = make_config(tmp_path, model)
    overrides = ["policy.sequence_packing.train_mb_tokens=45",
                 "policy.max_total_sequence_length=45", "data.on_too_long=drop"]  # fmt: skip
    assert main([str(config), "--check", *overrides]) == 2
    refused = capsys.readouterr().err
    assert all(f"{name}.jsonl:" in refused for name in ("train", "valid")), refused


def spoiled(model: Path, folder: Path) -> Path:
    """The model with one NaN where only one token's embedding is."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.distributed
def test_nan_loss_stops_and_names_the_pairs(model, tmp_path):
    config = make_config(tmp_path, spoiled(model, tmp_path / "spoiled"), data={"shuffle": False})
    with pytest.raises(DistributedError, match=r"NonFiniteLoss: loss nan.*\[0, 1, 2, 3, 4, 5, 6, 7\]"):
        run_distributed(train, 1, str(config), [], init_process_group=False)


@pytest.mark.distributed
def test_nan_loss_is_skipped_and_counted_where_asked(model, tmp_path):
    config = make_config(tmp_path, spoiled(model, tmp_path / "spoiled"), dpo={"on_nonfinite_loss": "skip"})
    assert run_distributed(train, 1, str(config), [], init_process_group=False) == [0]
    records = read_metrics(tmp_path / "logs")
    assert [r["train/skipped_steps"] for r in records] == [1, 2, 3]
    assert all(r["train/loss"] is None for r in records)


def train_with_small_disk(config: str, overrides: list[str]) -> int:
    """No file may grow past 100 kB: what a full disk looks like to whoever writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return train(config, overrides)


@pytest.mark.distributed
def test_full_disk_leaves_the_last_complete_checkpoint(model, tmp_path):
    config = make_config(tmp_path, model, checkpointing=SAVING)
    run = ["dpo.max_num_steps=1"]
    assert run_distributed(train, 1, str(config), run, init_process_group=False) == [0]
    with pytest.raises(DistributedError):
        run_distributed(train_with_small_disk, 1, str(config), [], init_process_group=False)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.glob("step_*")] == ["step_1"]
    (folder / ".step_77.partial").mkdir()  # of a process that was killed
    assert run_distributed(train, 1, str(config), [], init_process_group=False) == [0]  # and it still resumes
    assert [r["step"] for r in read_metrics(tmp_path / "logs")] == [1, 2, 3]
    assert not list(folder.glob(".*partial"))


@pytest.mark.distributed
def test_checkpoint_folder_that_cannot_be_written_is_refused_before_training(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = make_config(tmp_path, model, checkpointing={**SAVING, "checkpoint_dir": str(tmp_path / "file/inside")})
    assert run_distributed(train, 1, str(config), [], init_process_group=False) == [2]
    assert not (tmp_path / "logs/metrics.jsonl").exists()


@pytest.mark.distributed
def test_sigterm_saves_and_the_next_start_goes_on(model, tmp_path):
    """To every process, as Slurm sends it; torchrun then sends its workers another."""
    config = make_config(
        tmp_path, model, dpo={"max_num_steps": None, "max_num_epochs": 400}, checkpointing={"enabled": True}
    )
    process = launch(config, ranks=2)
    wait_for_step(tmp_path, 3, process)
    for pid in [*children(process.pid), process.pid]:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped after step" in output
    stopped = read_metrics(tmp_path / "logs")[-1]["step"]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{stopped}"]
    resumed = launch(config, f"dpo.max_num_steps={stopped + 2}", ranks=2)
    output, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, output
    assert [r["step"] for r in read_metrics(tmp_path / "logs")] == list(range(1, stopped + 3))


@pytest.mark.distributed
def test_the_patient_launcher_lets_ranks_save_and_keeps_torchrun(model, tmp_path):
    """SIGUSR1 to every process, as Slurm sends it before the time limit; torchrun alone would die of it."""
    config = make_config(
        tmp_path, model, dpo={"max_num_steps": None, "max_num_epochs": 400}, checkpointing={"enabled": True}
    )
    process = launch(config, ranks=2, launcher=["launch/torchrun.sh"])
    wait_for_step(tmp_path, 2, process)
    (torchrun,) = children(process.pid)
    for pid in [*children(torchrun), torchrun, process.pid]:
        os.kill(pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "exitcode  : 143" in output
    stopped = read_metrics(tmp_path / "logs")[-1]["step"]
    assert [p.name for p in (tmp_path / "checkpoints").glob("step_*")] == [f"step_{stopped}"]


@pytest.mark.distributed
def test_a_rank_that_dies_ends_the_run(model, tmp_path):
    config = make_config(tmp_path, model, dpo={"max_num_steps": None, "max_num_epochs": 400})
    process = launch(config, ranks=2)
    wait_for_step(tmp_path, 2, process)
    ranks = children(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    died = time.monotonic()
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - died < 60
    assert "Signal 9 (SIGKILL)" in output
