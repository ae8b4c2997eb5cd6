"""What goes wrong in a run: a clear error, the right exit code, and nothing lost."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import DistributedError, run_distributed
from tests.helpers.overrides import TP2
from tests.helpers.runs import make_config, make_model, read_metrics, train, train_and_read

REPOSITORY = Path(__file__).resolve().parents[2]
SAVING = {"enabled": True, "save_period": 1}
BAD_ROWS = ["train.jsonl:1", "train.jsonl:2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


CHECKED = [
    (["dpo.max_num_step=3", "policy.precision=half"], ["dpo.max_num_step", "max_num_steps", "policy.precision"]),
    (
        ["--world-size", "3", "policy.megatron_cfg.tensor_model_parallel_size=3"],
        ["attention heads", "vocab", *BAD_ROWS],
    ),
    ([], BAD_ROWS),
    (["policy.model_name=/no/such/folder"], ["policy.model_name", "/no/such/folder", *BAD_ROWS]),
    (["policy.tokenizer.name=/no/such/folder"], ["policy.tokenizer.name", *BAD_ROWS]),
]


@pytest.fixture
def spoiled_config(model, tmp_path):
    config = make_config(tmp_path, model)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n{broken\n')
    return str(config)


def test_check_exits_2(spoiled_config):
    check = [sys.executable, "launch/train.py", spoiled_config, "--check"]
    done = subprocess.run(check, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and all(word in done.stderr for word in BAD_ROWS), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("overrides", "words"), CHECKED)
def test_check_lists_every_problem(overrides, words, spoiled_config, capsys):
    from megadpo.commands import main

    assert main(["train", spoiled_config, "--check", *overrides]) == 2
    printed = capsys.readouterr().err
    assert [word for word in words if word not in printed] == []


def test_a_check_for_no_rank_exits_2(spoiled_config, capsys):
    from megadpo.commands import main

    with pytest.raises(SystemExit, match="^2$"):
        main(["train", spoiled_config, "--check", "--world-size", "0"])
    assert "--world-size: 0: must be" in capsys.readouterr().err


def test_check_lists_what_fits_in_no_batch_of_every_set(model, tmp_path, capsys):
    from megadpo.commands import main

    config = make_config(tmp_path, model)
    overrides = ["policy.sequence_packing.train_mb_tokens=45",
                 "policy.max_total_sequence_length=45", "data.on_too_long=drop"]  # fmt: skip
    assert main(["check", str(config), *overrides]) == 2
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


def train_with_small_disk(config: str, overrides: list[str]) -> tuple[int, str]:
    """No file may grow past 100 kB: what a full disk looks like to whoever writes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return train_and_read(config, overrides)


@pytest.mark.distributed
@pytest.mark.parametrize("more", [[], ["checkpointing.async_save=true"]])
def test_full_disk_leaves_the_last_complete_checkpoint(model, tmp_path, more):
    config = make_config(tmp_path, model, checkpointing=SAVING)
    run = ["dpo.max_num_steps=1"]
    assert run_distributed(train, 1, str(config), run, init_process_group=False) == [0]
    [(code, said)] = run_distributed(train_with_small_disk, 1, str(config), more, init_process_group=False)
    assert code == 74 and "checkpoint was not saved" in said, said
    # Python 3.13 prints one of torch's own wrapper of the file that is full
    assert said.count("Traceback") == said.count("flush of closed file")
    assert "step_2.partial: [Errno 27] File too large; " in said, said
    assert said.count("another checkpoint_dir") == 1 + bool(more)
    assert re.search(r"; [\d,]{7,} bytes of tensors are to be written, [\d,]+ bytes are free there;", said)
    assert ("NOT SAVED: step 2; tried again now" in said) == bool(more)
    folder = tmp_path / "checkpoints"
    assert [path.name for path in folder.glob("step_*")] == ["step_1"]
    (folder / ".step_77.partial").mkdir()  # of a process that was killed
    assert run_distributed(train, 1, str(config), [], init_process_group=False) == [0]  # and it still resumes
    assert [r["step"] for r in read_metrics(tmp_path / "logs")] == [1, 2, 3]
    assert not list(folder.glob(".*partial"))


def train_where_only_rank_0_fails(config: str, what: str) -> tuple[int, str]:
    """What the other rank doesn't meet: the folder can't be made, or the metadata of all ranks can't be written."""
    from megadpo.checkpoint import writer

    if what == "metadata":

        def full(*_):
            raise OSError(28, "No space left on device")

        writer.save_config = full
    return train_and_read(config, [TP2, "checkpointing.async_save=true"])


@pytest.mark.distributed
@pytest.mark.parametrize(("what", "words"), [("folder", "Not a directory"), ("metadata", "No space left on device")])
def test_a_save_that_fails_on_one_rank_ends_all(model, tmp_path, what, words):
    config = make_config(tmp_path, model, checkpointing={"enabled": True, "save_period": 2})
    if what == "folder":
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/.step_2.partial").touch()
    results = run_distributed(train_where_only_rank_0_fails, 2, str(config), what, init_process_group=False)
    for code, said in results:
        assert code == 74 and f".partial: [Errno {20 if what == 'folder' else 28}] {words}" in said, said
        assert "Traceback" not in said
    assert results[0][1].count("NOT SAVED") == 1
    assert not list((tmp_path / "checkpoints").glob("step_*"))


@pytest.mark.distributed
def test_checkpoint_folder_that_cannot_be_written_is_refused_before_training(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = make_config(tmp_path, model, checkpointing={**SAVING, "checkpoint_dir": str(tmp_path / "file/inside")})
    assert run_distributed(train, 1, str(config), [], init_process_group=False) == [2]
    assert not (tmp_path / "logs/metrics.jsonl").exists()
