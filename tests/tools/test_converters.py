"""tools/hf_to_megatron.py and tools/megatron_to_hf.py as a user starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.helpers.distributed import REPOSITORY
from tests.model.weights.hf_models import make_hf_folder, read_tensors
from tools import hf_to_megatron, megatron_to_hf


def run(tool: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a folder that is not the repository, by the tool's path."""
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_there_and_back_by_command(tmp_path):
    source = make_hf_folder(tmp_path / "source", "qwen3")
    there = run("hf_to_megatron.py", tmp_path, "--hf", "source", "--megatron", "megatron", "--dtype", "bfloat16")
    assert there.returncode == 0, there.stderr
    assert (there.stdout, there.stderr) == ("wrote megatron\n", "")
    back = run("megatron_to_hf.py", tmp_path, "--megatron", "megatron", "--hf", "back")
    assert back.returncode == 0, back.stderr
    got, want = read_tensors(tmp_path / "back"), read_tensors(source)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in want.items())


def test_refusals_exit_with_2_and_name_the_problem(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert hf_to_megatron.main(["--hf", empty, "--megatron", str(tmp_path / "megatron")]) == 2
    assert "  --hf: got " in (said := capsys.readouterr().err) and "config.json" in said
    assert megatron_to_hf.main(["--megatron", empty, "--hf", str(tmp_path / "hf")]) == 2
    assert "no megadpo.json" in capsys.readouterr().err
    for step in (50, 100, 9):
        (tmp_path / f"empty/step_{step}").mkdir()
        (tmp_path / f"empty/step_{step}/megadpo.json").touch()
    assert megatron_to_hf.main(["--megatron", empty, "--hf", str(tmp_path / "hf")]) == 2
    assert f"such as {empty}/step_100" in capsys.readouterr().err


def test_an_export_is_uploaded_whole(tmp_path, capsys, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **how):
            calls.append((name, how))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if repo_id == "me/closed":
                raise OSError("403 Forbidden: not yours\nsecond line")
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    source = make_hf_folder(tmp_path / "source", "llama")
    megatron = str(tmp_path / "megatron")
    assert hf_to_megatron.main(["--hf", str(source), "--megatron", megatron]) == 0
    out = str(tmp_path / "open")
    assert megatron_to_hf.main(["--megatron", megatron, "--hf", out, "--push-to-hub", "me/model"]) == 0
    assert calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        ("me/model", {path.name for path in source.iterdir()}),
    ]
    assert "uploaded to https://hub/me/model" in capsys.readouterr().out
    closed = str(tmp_path / "closed")
    assert megatron_to_hf.main(["--megatron", megatron, "--hf", closed, "--push-to-hub", "me/closed"]) == 2
    said = capsys.readouterr()
    assert "403 Forbidden: not yours)" in said.err and f"hf upload me/closed {closed}" in said.err
    assert f"wrote {closed}" in said.out and (tmp_path / "closed/model.safetensors").is_file()
